"""A lottery ticket on disk and in memory: the seed of the initial weights, one bit a weight, and a hash that proves both.

File: safetensors. Tensor `<parameter>.mask_bits` (uint8): the mask, row-major, eight weights a byte, lowest bit first.
Tensor `<parameter>.values`: the survivors' values, only where no seed gives them back (a model not initialized by
initperf, or rewound to an iteration k > 0). Tensor `<buffer>.buffer`: running statistics, of a rewound model only. Metadata key "initperf", JSON: format, rng (version of the contract), seed,
parameters {name: {shape, dtype unless float32, init and args unless stored}}, sha256 (over names and raw little-endian
bytes of the initial parameters, sorted by name), recipe, crc32 of all of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor, nn

from initperf import rng
from initperf.core import ops
from initperf.core.checks import InitPerfError, check, check_float_tensor, check_mask, check_seed, fail
from initperf.core.files import write_atomically
from initperf.init.schemes import Init
from initperf.layers.base.sparse import SparseLayer

FORMAT = 1
KEY = "initperf"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_OF_MASKS = ("weight_mask", "weight_mask_bits")  # ends of the names of masked and compressed layers' buffers
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_KNOWN = (
    "constant",
    "uniform",
    "normal",
    "trunc_normal",
)  # what comes back from a seed; an orthogonal matrix is stored


class Parameter(NamedTuple):
    """One parameter of the model; init None means that the ticket holds its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    init: Init | None


@dataclass(frozen=True)
class Ticket:
    """Initial weights and masks of one model. `masks` holds bool tensors (True = survives) for the pruned parameters only."""

    parameters: dict[str, Parameter]
    masks: dict[str, Tensor]
    sha256: str
    seed: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    rng_version: int = rng.VERSION
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        weights = "from the seed" if self.seed is not None and not self.values else "stored survivors"
        return (
            f"Ticket({len(self.parameters)} parameters, {len(self.masks)} masks, density={self.density:.4g}, "
            f"seed={self.seed}, weights {weights}, sha256={self.sha256[:12]}...)"
        )

    @property
    def density(self) -> float:
        """Survivors / weights of the parameters that have a mask; 1 without masks."""
        total = sum(m.numel() for m in self.masks.values())
        return sum(int(torch.count_nonzero(m)) for m in self.masks.values()) / total if total else 1.0

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        masks: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
        inits: Mapping[str, Init] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        recipe: Mapping[str, Any] | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> Ticket:
        """The ticket of `model`: its masks (the layers' own, or `masks`) and initial weights.

        Initial weights are `weights` (name -> dense tensor), else what `inits` gives (the result of initperf.init.initialize,
        or name -> Init with a `seed`), else the model's present values. A parameter whose bits come back from the seed costs
        no bytes; of others the survivors are stored. buffers: to be stored, too (running statistics of a rewound model).
        """
        found = dense_parameters(model)
        given = {canonical(n): t for n, t in weights.items()} if weights is not None else None
        chosen = model_masks(model) if masks is None else {canonical(n): m for n, m in masks.items()}
        given_inits = inits
        inits = {canonical(n): i for n, i in (inits or {}).items() if i.function in _KNOWN}
        seed = getattr(given_inits, "seed", None) if seed is None else seed
        if inits:
            check(seed is not None, "a seed, since inits are given", None)
            check_seed(seed)
        for name, given_mask in chosen.items():
            check(name in found, f"masks of parameters of the model ({', '.join(found)})", name)
            check_mask(given_mask, found[name].shape, f"masks[{name!r}]")
        parameters, values = {}, {}
        digest = _Digest()
        for name, parameter in sorted(found.items()):
            check_float_tensor(parameter, name)
            init, mask = inits.get(name), chosen.get(name)
            shape, dtype = tuple(parameter.shape), parameter.dtype
            initial = None if init is None else regenerate(name, shape, dtype, init, seed or 0)
            if initial is None or given is not None:
                source = parameter if given is None else given.get(name, parameter)
                check(tuple(source.shape) == shape, f"weights[{name!r}] of shape {shape}", tuple(source.shape))
                now = _pruned(source.detach().to("cpu", dtype), mask)
                if initial is None or not _same_bits(_pruned(initial, mask), now):
                    init, initial = None, now
                    values[name] = now.clone() if mask is None else now[mask.cpu()]
            parameters[name] = Parameter(shape, dtype, init)
            digest.add(name, initial)
        kept = {n: m.detach().cpu().clone() for n, m in chosen.items()}
        needs_seed = any(p.init is not None and p.init.function != "constant" for p in parameters.values())
        stored = {
            canonical(n): b.detach().cpu().clone() for n, b in (buffers or {}).items() if not n.endswith(_OF_MASKS)
        }
        return cls(
            parameters,
            kept,
            digest.hex(),
            seed if needs_seed else None,
            values,
            dict(recipe or {}),
            buffers=stored,
        )

    def weights(self) -> dict[str, Tensor]:
        """The initial parameters, dense, zero where pruned; raises if the hash does not prove them."""
        digest, found = _Digest(), {}
        for name, (shape, dtype, init) in sorted(self.parameters.items()):
            mask = self.masks.get(name)
            if init is not None:
                whole = regenerate(name, shape, dtype, init, self.seed or 0)
            elif mask is None:
                whole = self.values[name].view(shape)
            else:
                whole = torch.zeros(shape, dtype=dtype, device="cpu").masked_scatter_(mask, self.values[name])
            digest.add(name, whole)
            found[name] = _pruned(whole, mask)
        if digest.hex() != self.sha256:
            fail(
                f"initial weights with SHA-256 {self.sha256[:16]}... (RNG contract version {self.rng_version})",
                f"{digest.hex()[:16]}... (version {rng.VERSION}): the ticket is damaged, or of another version",
            )
        return {name: found[name] for name in self.parameters}

    def apply(self, model: nn.Module) -> nn.Module:
        """Give `model` the ticket's initial weights and masks, in place; nothing is touched unless all of it fits. Returns it."""
        found = dense_parameters(model)
        missing, extra = self.parameters.keys() - found.keys(), found.keys() - self.parameters.keys()
        if missing or extra:
            fail(
                f"a model with the ticket's parameters ({', '.join(self.parameters)})",
                "; ".join(
                    f"{what} {', '.join(sorted(v))}" for what, v in (("one without", missing), ("with", extra)) if v
                ),
            )
        for name, (shape, dtype, _) in self.parameters.items():
            check(tuple(found[name].shape) == shape, f"{name} to have shape {shape}", tuple(found[name].shape))
            check(found[name].dtype == dtype, f"{name} to have dtype {dtype}", found[name].dtype)
        own = {canonical(n): b for n, b in model.named_buffers()}
        for name, buffer in self.buffers.items():
            check(name in own, f"a model with the ticket's buffers ({', '.join(self.buffers)})", f"one without {name}")
            check(
                own[name].shape == buffer.shape, f"{name} to have shape {tuple(buffer.shape)}", tuple(own[name].shape)
            )
        initial = self.weights()
        mask_layers(model, self.masks, sparse=None)
        compressed = compressed_layers(model)
        with torch.no_grad():
            for name, parameter in named_parameters(model).items():
                layer = compressed.get(name)
                parameter.copy_(initial[name] if layer is None else initial[name][layer.weight_mask.cpu()][:, None])
            for name, buffer in self.buffers.items():
                own[name].copy_(buffer)
        return model

    def export(self, path: str | Path, model: nn.Module | None = None) -> Path:
        """Write a dense safetensors checkpoint, pruned weights zero, with the keys of a plain model: loads without initperf.

        The values are the ticket's initial weights, or those of `model` (a network trained from it, with its buffers).
        """
        if model is None:
            state = self.weights() | self.buffers
            return write_atomically(path, safetensors.save({n: t.contiguous() for n, t in state.items()}))
        found = dense_parameters(model)
        check(
            found.keys() == self.parameters.keys(),
            f"a model with parameters {', '.join(self.parameters)}",
            ", ".join(found),
        )
        dense = {n: _pruned(p.detach().cpu(), self.masks.get(n)).contiguous() for n, p in found.items()}
        buffers = {canonical(n): b for n, b in model.named_buffers() if not n.endswith(_OF_MASKS)}
        return write_atomically(
            path, safetensors.save({**dense, **{n: b.cpu().contiguous() for n, b in buffers.items()}})
        )

    def to_bytes(self) -> bytes:
        """The file."""
        tensors = {
            f"{n}.mask_bits": torch.from_numpy(np.packbits(m.numpy(), bitorder="little")) for n, m in self.masks.items()
        }
        tensors |= {f"{n}.values": v.contiguous() for n, v in self.values.items()}
        tensors |= {f"{n}.buffer": b.contiguous() for n, b in self.buffers.items()}
        about: dict[str, Any] = {"format": FORMAT, "rng": self.rng_version, "seed": self.seed, "parameters": {}}
        for name, (shape, dtype, init) in self.parameters.items():
            entry: dict[str, Any] = {"shape": list(shape)}
            if dtype != torch.float32:
                entry["dtype"] = _NAMES[dtype]
            if init is not None:
                entry |= {"init": init.function, "args": list(init.args)}
            about["parameters"][name] = entry
        about |= {"sha256": self.sha256, "recipe": self.recipe}
        about["crc32"] = _crc32(about, tensors)
        return safetensors.save(tensors, {KEY: _json(about)})

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        return write_atomically(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path) -> Ticket:
        """Read a ticket file; anything damaged, truncated or foreign raises InitPerfError."""
        path = Path(path)
        check(path.is_file(), f"a ticket file {path}", "no such file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            fail(f"a ticket file (safetensors) in {path}", f"{error} (damaged, truncated, or another format)")
        if KEY not in metadata:
            fail(
                f"a ticket in {path}: metadata key {KEY!r}",
                f"a safetensors file with keys {', '.join(metadata) or 'none'}",
            )
        try:
            about = json.loads(metadata[KEY])
            return _parse(cls, about, tensors)
        except InitPerfError as error:
            raise InitPerfError(f"{error} In the ticket {path}.") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fail(f"a ticket in {path}", f"metadata that does not read: {type(error).__name__}: {error}")


def _parse(cls: type[Ticket], about: dict[str, Any], tensors: dict[str, Tensor]) -> Ticket:
    check(about["format"] == FORMAT, f"ticket format {FORMAT}", about["format"])
    crc = about.pop("crc32")
    check(crc == _crc32(about, tensors), f"contents with CRC-32 {crc}", "others: the file is damaged")
    parameters, masks, values = {}, {}, {}
    for name, entry in about["parameters"].items():
        shape, dtype = tuple(int(s) for s in entry["shape"]), _DTYPES[entry.get("dtype", "float32")]
        init = None
        if "init" in entry:
            init = Init(entry["init"], tuple(float(a) for a in entry["args"]))
            check(init.function in _KNOWN, f"an init of {', '.join(_KNOWN)} for {name}", init.function)
            init.check(name)
        size = math.prod(shape)
        if f"{name}.mask_bits" in tensors:
            bits = tensors[f"{name}.mask_bits"]
            fits = bits.dtype == torch.uint8 and bits.numel() == (size + 7) // 8
            check(fits, f"{(size + 7) // 8} bytes in {name}.mask_bits", f"{bits.numel()} of {bits.dtype}")
            flat = np.unpackbits(bits.numpy(), count=size, bitorder="little")
            masks[name] = torch.from_numpy(flat.astype(bool)).view(shape)
        if init is None:
            count = int(masks[name].sum()) if name in masks else size
            values[name] = tensors[f"{name}.values"]
            fits = values[name].dtype == dtype and values[name].numel() == count
            check(
                fits, f"{count} values of {dtype} in {name}.values", f"{values[name].numel()} of {values[name].dtype}"
            )
        parameters[name] = Parameter(shape, dtype, init)
    seed = None if about["seed"] is None else check_seed(about["seed"])
    end = ".buffer"
    buffers = {key.removesuffix(end): tensor for key, tensor in tensors.items() if key.endswith(end)}
    return cls(parameters, masks, about["sha256"], seed, values, about["recipe"], int(about["rng"]), buffers)


def regenerate(name: str, shape: tuple[int, ...], dtype: torch.dtype, init: Init, seed: int) -> Tensor:
    """The initial value of parameter `name`, on the CPU, from the RNG contract: stream_of(name), index = row-major position."""
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if init.function == "constant":
        return out.fill_(init.args[0])
    return ops.implementation("sample_", "cpu")(out, *init.distribution(dtype), seed, rng.stream_of(name))


def canonical(name: str) -> str:
    """A parameter's name without wrappers' parts."""
    return rng.canonical_name(name)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """canonical name -> parameter; a tied parameter once, by its first name."""
    return {canonical(name): parameter for name, parameter in model.named_parameters()}


def compressed_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """canonical name of the dense weight -> the layer that holds its survivors only."""
    return {
        canonical(f"{path}.weight" if path else "weight"): module
        for path, module in model.named_modules()
        if isinstance(module, SparseLayer)
    }


def dense_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The same, with the dense weight, zero where pruned, for a layer of compressed storage."""
    found: dict[str, Tensor] = dict(named_parameters(model))
    for name, layer in compressed_layers(model).items():
        weight: Any = layer.to_dense().weight
        found[name] = weight.detach()
    return found


def mask_layers(model: nn.Module, masks: Mapping[str, Tensor], *, sparse: bool | None = False) -> nn.Module:
    """sparsify, with canonical names."""
    from initperf.layers.convert import sparsify

    compressed = compressed_layers(model)
    actual = {canonical(n): n for n, _ in model.named_parameters() if canonical(n) not in compressed}
    for path, module in model.named_modules():
        if isinstance(module, SparseLayer):
            name = f"{path}.weight" if path else "weight"
            actual[canonical(name)] = name
    return sparsify(model, {actual[name]: mask for name, mask in masks.items()}, sparse=sparse)


def model_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the model's layers: buffers `weight_mask` beside a parameter `weight`, and those of compressed layers."""
    suffix = "_mask"
    names = named_parameters(model)
    found = {canonical(n.removesuffix(suffix)): b for n, b in model.named_buffers() if n.endswith(suffix)}
    masks = {name: mask.bool() for name, mask in found.items() if name in names}
    return masks | {name: layer.weight_mask for name, layer in compressed_layers(model).items()}


class _Digest:
    """SHA-256 over names and raw little-endian bytes; parameters must come sorted by name."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        self._sha.update(name.encode())
        self._sha.update(_raw(tensor))

    def hex(self) -> str:
        return self._sha.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, little-endian."""
    words = tensor.detach().contiguous().reshape(-1)
    if words.element_size() > 1:
        words = words.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[words.element_size()])
    array = words.numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _pruned(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """A copy with +0.0 where pruned."""
    return tensor if mask is None else tensor.masked_fill(~mask.to(tensor.device), 0)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return _raw(a) == _raw(b)


def _json(about: Mapping[str, Any]) -> str:
    return json.dumps(about, separators=(",", ":"))


def _crc32(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(_json(about).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(_raw(tensors[name]), zlib.crc32(name.encode(), crc))
    return crc
