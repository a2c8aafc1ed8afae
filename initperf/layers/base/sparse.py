"""SparseLayer: what every layer with a compressed weight has in common: survivors' values, the mask as bits, checkpoints."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from initperf import rng
from initperf.core.bits import bits_set, check_bits, pack_bits, unpack_bits
from initperf.core.checks import FLOATS, check_mask, check_mask_has_data, fail
from initperf.layers.base.masked import MaskedLayer, check_own_weight, new_module
from initperf.layers.base.pattern import CompressedPattern, Pattern
from initperf.layers.base.reshape_parameter import reshape, watch_optimizers
from initperf.layers.base.survivors import pick, spread
from initperf.rng import sampling

if TYPE_CHECKING:
    from typing_extensions import Self

COMPRESSED: weakref.WeakSet[SparseLayer] = weakref.WeakSet()  # all that live: optimizers know only their parameters


class SparseLayer(nn.Module):
    """Parameter `weight_values` (nnz, 1), the survivors in row-major order, and buffer `weight_mask_bits`, the packed mask.

    weight_mask_bits: uint8, row-major, lowest bit first. There is no `weight`: a copy would swallow edits in silence.
    A subclass sets DENSE, MASKED, ATTRIBUTES and weight_shape, and calls _adopt at the end of its __init__.
    set_mask, and a checkpoint with another mask, change the shape of weight_values, which stays the same Parameter; an
    optimizer that already has state must follow (initperf.mask_optimizer_, before the change), or its next step raises.
    """

    DENSE: ClassVar[type[nn.Module]]
    MASKED: ClassVar[type[MaskedLayer]]
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # of DENSE, all but parameters

    weight_values: Tensor
    weight_mask_bits: Tensor
    bias: Tensor | None
    _pattern: Pattern
    _bits_off_meta: Tensor | None = None  # the mask, while weight_mask_bits is on the meta device

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        raise NotImplementedError

    @property
    def weight_mask(self) -> Tensor:
        """The bool mask, unpacked into a new tensor: edits of it change nothing, set_mask does."""
        if self.weight_mask_bits.is_meta:
            return torch.empty(self.weight_shape, dtype=torch.bool, device="meta")
        return unpack_bits(self.weight_mask_bits, self.weight_shape)

    @property
    def nnz(self) -> int:
        """Number of survivors."""
        return self.weight_values.shape[0]

    @property
    def density(self) -> float:
        """Surviving fraction."""
        return self.nnz / size if (size := math.prod(self.weight_shape)) else 1.0

    @classmethod
    def _of(cls, dense: nn.Module, weight: Tensor, mask: Tensor | None) -> Self:
        """A layer with copies of a dense weight's survivors and of the bias of `dense`."""
        layer = new_module(cls, dense, cls.ATTRIBUTES)
        if mask is None:
            mask = torch.ones_like(weight, dtype=torch.bool)
        mask = mask.to(weight.device)
        values = pick(weight.detach(), mask)
        layer.register_parameter("weight_values", nn.Parameter(values, weight.requires_grad))
        bias = dense._parameters["bias"]
        copy = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        layer.register_parameter("bias", copy)
        layer._adopt(mask)
        return layer

    @classmethod
    def _from_dense_layer(cls, dense: nn.Module, mask: Tensor | None) -> Self:
        check_own_weight(dense, cls.DENSE, cls.DENSE.__name__.lower())
        weight = cast(Tensor, dense.weight)
        if mask is not None:
            check_mask(mask, weight.shape)
            check_mask_has_data(mask, weight)
        if weight.dtype not in FLOATS:
            fail("a weight of float32, bfloat16, float16 or float64", weight.dtype)
        return cls._of(dense, weight, mask)

    @classmethod
    def from_masked(cls, masked: MaskedLayer) -> Self:
        """A compressed copy of a masked layer: the same mask, and copies of the survivors and the bias."""
        check_own_weight(masked, cls.MASKED, "masked")
        return cls._of(masked, masked.weight, masked.weight_mask)

    def to_dense(self) -> nn.Module:
        """The dense layer, with copies of the survivors, zeros elsewhere, and the bias."""
        dense = new_module(self.DENSE, self, self.ATTRIBUTES)
        weight = self.expand(self.weight_values.detach())
        dense.register_parameter("weight", nn.Parameter(weight, self.weight_values.requires_grad))
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        dense.register_parameter("bias", bias)
        return dense

    def to_masked(self) -> MaskedLayer:
        """The masked layer, with the same mask, and copies of the survivors and the bias."""
        return self.MASKED.on(self.to_dense(), self.weight_mask)

    @torch.no_grad()
    def expand(self, values: Tensor) -> Tensor:
        """values (nnz, 1), such as optimizer state, as a dense tensor of weight_shape, 0 where pruned."""
        return spread(values, self.weight_mask_bits, self.weight_shape)

    @torch.no_grad()
    def compress(self, dense: Tensor) -> Tensor:
        """The survivors (nnz, 1) of a dense tensor of weight_shape."""
        return pick(dense, self.weight_mask)

    def _adopt(self, mask: Tensor | None) -> None:
        """Take `mask` (checked; None: all survive) as the buffer; weight_values has its survivors already."""
        device = self.weight_values.device
        if mask is None or mask.is_meta:
            mask = torch.ones(self.weight_shape, dtype=torch.bool, device="cpu" if device.type == "meta" else device)
        bits = pack_bits(mask)
        if device.type == "meta":
            self._bits_off_meta = bits
        self.register_buffer("weight_mask_bits", bits.to(device))
        self._renew()
        COMPRESSED.add(self)
        watch_optimizers()

    def _become(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Called on a dense or masked layer whose class was just changed to this: its weight Parameter becomes weight_values."""
        self._parameters = {
            "weight_values" if name == "weight" else name: value for name, value in self._parameters.items()
        }
        mask = mask.to(parameter.device)
        reshape(parameter, lambda t: pick(t, mask))
        self._adopt(mask)

    def _leave(self) -> nn.Parameter:
        """The reverse; the caller sets the class. The Parameter is dense then, 0 where pruned, and called weight."""
        parameter = cast(nn.Parameter, self.weight_values)
        reshape(parameter, self.expand)
        self._parameters = {
            "weight" if name == "weight_values" else name: value for name, value in self._parameters.items()
        }
        self._buffers.pop("weight_mask_bits")
        for name in ("_pattern", "_kept", "_bits_off_meta"):
            self.__dict__.pop(name, None)
        COMPRESSED.discard(self)
        return parameter

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask: pruned weights go, revived ones start at 0. An optimizer with state must follow (mask_optimizer_)."""
        check_mask(mask, self.weight_shape)
        check_mask_has_data(mask, self.weight_mask_bits)
        mask = mask.to(self.weight_mask_bits.device)
        old = self.weight_mask
        if not mask.is_meta and torch.equal(mask, old) and self._pattern.is_of(self.weight_mask_bits):
            return

        bits = pack_bits(mask)
        before = self.weight_mask_bits.clone()
        reshape(cast(nn.Parameter, self.weight_values), lambda values: pick(spread(values, before, mask.shape), mask))
        self.weight_mask_bits.copy_(bits)
        self._renew()

    def _renew(self) -> None:
        """Build what the kernels read, after the mask or the values were replaced."""
        if self.weight_values.dtype not in FLOATS:
            fail("weight_values of float32, bfloat16, float16 or float64", self.weight_values.dtype)
        bits = self.weight_mask_bits
        if not bits.is_meta:
            check_bits(bits, self.weight_shape, self.nnz, "weight_mask_bits")
            self._bits_off_meta = None
        self.__dict__.pop("_kept", None)
        self._pattern = self._new_pattern()

    def _new_pattern(self) -> Pattern:
        """What the mask means to the kernels of this layer."""
        return CompressedPattern(self.weight_mask_bits, self.weight_shape)

    def _fresh_pattern(self) -> Pattern:
        if not self._pattern.is_of(cast(Tensor, self._buffers["weight_mask_bits"])):
            self._renew()
        return self._pattern

    def reset_parameters(self) -> None:
        """Sample the survivors and the bias as the dense layer does (kaiming_uniform_, a = sqrt(5)): the values it has there."""
        from initperf import init

        shape = self.weight_shape
        fan_in = math.prod(shape[1:])
        bound = fan_in**-0.5 if fan_in else 0.0
        values = self.weight_values
        if values.numel() and not values.is_meta:
            seed = rng.draw_seed()
            bounds = rng.uniform(-bound, bound, values.dtype)
            sampling.sample_survivors_into(values, bounds, self.weight_mask_bits, shape, seed=seed)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        return f"density={self.density:.4g}, nnz={self.nnz}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pattern", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern = self._new_pattern()
        COMPRESSED.add(self)
        watch_optimizers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.weight_mask_bits
        self.__dict__.pop("_kept", None)
        super()._apply(fn, recurse)
        bits = self.weight_mask_bits
        if bits is before:
            return self
        if bits.dtype != torch.uint8:  # module.type(dtype) converts buffers of any dtype
            self.weight_mask_bits = bits = before.to(bits.device)
        if bits.is_meta and not before.is_meta:
            self._bits_off_meta = before.cpu()
        elif before.is_meta and not bits.is_meta and self._bits_off_meta is not None:
            bits.copy_(self._bits_off_meta)  # to_empty: its memory is arbitrary
        self._renew()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state_dict = dict(state_dict)
        values, bits = prefix + "weight_values", prefix + "weight_mask_bits"
        problems = list(self._problems(state_dict, prefix))
        if problems:
            error_msgs.extend(problems)
            return
        self._compress_entries(state_dict, prefix)
        new = state_dict.get(bits)
        if new is not None and not new.is_meta and not self.weight_mask_bits.is_meta:
            if not torch.equal(new.to(self.weight_mask_bits.device), self.weight_mask_bits):
                self.set_mask(unpack_bits(new, self.weight_shape))
        elif new is not None and values in state_dict and state_dict[values].shape != self.weight_values.shape:
            rows = state_dict[values].shape[0]
            reshape(cast(nn.Parameter, self.weight_values), lambda t: t.new_empty(rows, 1))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if bits in missing_keys:  # the checkpoint is dense: the mask that is here stays
            missing_keys.remove(bits)
        self._renew()

    def _compress_entries(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Turn the entries of a dense, masked or torch.nn.utils.prune layer into this layer's own."""
        for name in ("weight", "weight_orig"):
            weight = state_dict.get(prefix + name)
            if weight is None or prefix + "weight_values" in state_dict:
                continue
            del state_dict[prefix + name]
            mask = state_dict.pop(prefix + "weight_mask", None)
            mask = self.weight_mask if mask is None else mask.bool()
            state_dict[prefix + "weight_mask_bits"] = pack_bits(mask)
            state_dict[prefix + "weight_values"] = pick(weight.detach(), mask)

    def _problems(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Why the entries for this layer cannot load; nothing of it is touched then."""
        size = math.prod(self.weight_shape)
        bias = self._parameters.get("bias")
        expected = {
            "weight": self.weight_shape,
            "weight_orig": self.weight_shape,
            "weight_mask": self.weight_shape,
            "weight_mask_bits": (-(-size // 8),),
            "bias": None if bias is None else bias.shape,
        }
        found = {name: state_dict.get(prefix + name) for name in (*expected, "weight_values")}
        misfits = False
        for name, shape in expected.items():
            value = found[name]
            if not isinstance(value, Tensor) or shape is None:
                continue
            if value.shape != shape:
                yield f"size mismatch for {prefix + name}: Expected shape {tuple(shape)}. Got {tuple(value.shape)}."
                misfits = True
            elif name == "weight_mask_bits" and value.dtype != torch.uint8:
                yield f"Expected {prefix + name} of dtype torch.uint8. Got {value.dtype}."
                misfits = True
        if misfits:
            return
        mask, values, bits = found["weight_mask"], found["weight_values"], found["weight_mask_bits"]
        if mask is not None and not mask.is_meta and not bool(((mask == 0) | (mask == 1)).all()):
            yield f"Expected {prefix}weight_mask to hold only 0 and 1 (True = survives). Got other values, dtype {mask.dtype}."
        if values is None:
            return
        rows = self.nnz if bits is None or bits.is_meta else bits_set(bits)
        if values.shape != (rows, 1) and not values.is_meta:
            of = "the mask that is here" if bits is None else f"{prefix}weight_mask_bits"
            yield (
                f"size mismatch for {prefix}weight_values: Expected shape {(rows, 1)}, the survivors of {of}. "
                f"Got {tuple(values.shape)}."
            )
        elif bits is not None and not bits.is_meta:
            try:
                check_bits(bits, self.weight_shape, rows, f"{prefix}weight_mask_bits")
            except ValueError as problem:
                yield str(problem)
