"""MaskedLinear, an nn.Linear that trains only its survivors, and the conversion of whole models.

The weight is dense and exactly zero where the mask is False; its gradient is exactly zero there too, so elementwise
optimizers (SGD, Adam and kin) never revive a weight. For others, and for state older than the mask: mask_optimizer_.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from initperf import masked_ops
from initperf.checks import (
    FLOATS,
    InitPerfError,
    InitPerfRuntimeError,
    InitPerfTypeError,
    check,
    check_mask,
    fail,
)
from initperf.pattern import SparsePattern

_layers: weakref.WeakSet[MaskedLinear] = weakref.WeakSet()
_masked_optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class MaskedLinear(nn.Linear):
    """y = x (W o M)^T + b: nn.Linear with a persistent bool buffer `weight_mask` (out_features, in_features), True = survives.

    x: (..., in_features), float32, bfloat16, float16 or float64. mask None: all survive. Checkpoints of nn.Linear load, and
    the mask that is here is applied to them; to_linear() gives an nn.Linear back.
    """

    weight_mask: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        if mask is not None:
            check_mask(mask, (out_features, in_features))
        if dtype is not None and dtype not in FLOATS:
            fail("dtype float32, bfloat16, float16 or float64", dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> MaskedLinear:
        """A masked layer on the same Parameter objects as `linear`, so an optimizer made before keeps working; they are masked in place."""
        _check_linear(linear, "linear")
        check_mask(mask, linear.weight.shape) if mask is not None else None
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features, layer.training = linear.in_features, linear.out_features, linear.training
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._adopt(mask)
        return layer

    @classmethod
    def from_dense(cls, module: nn.Linear) -> MaskedLinear:
        """What torch.ao.pruning's convert calls: the mask is that of its sparsifier, or what is not zero in the weight."""
        parametrizations = getattr(module, "parametrizations", {})
        if "weight" not in parametrizations:
            return cls.from_linear(module, module.weight != 0)
        steps = parametrizations["weight"]
        linear = nn.utils.skip_init(nn.Linear, module.in_features, module.out_features, module.bias is not None)
        linear.weight, linear.bias = steps.original, module.bias
        masks = [step.mask for step in steps if isinstance(getattr(step, "mask", None), Tensor)]
        return cls.from_linear(linear.train(module.training), masks[0].bool() if masks else module.weight != 0)

    def _adopt(self, mask: Tensor | None) -> None:
        """Take `mask` (checked) as the buffer, and make the weight obey it."""
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        else:
            mask = torch.empty_like(self.weight, dtype=torch.bool, memory_format=torch.contiguous_format).copy_(mask)
        self.register_buffer("weight_mask", mask)
        self._obey()
        _layers.add(self)

    @torch.no_grad()
    def _obey(self) -> None:
        """Zero the pruned weights, and build what the kernels read, after the mask or the weight was replaced."""
        if self.weight.dtype not in FLOATS:
            fail("a weight of float32, bfloat16, float16 or float64", self.weight.dtype)
        if self.weight_mask.dtype != torch.bool:
            self.weight_mask = self.weight_mask.bool()
        self._pattern = SparsePattern(self.weight_mask)
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_meta and self._pattern.nnz < weight.numel():
            pruned = ~self.weight_mask
            weight.masked_fill_(pruned, 0)
            if weight.grad is not None:  # from before the mask: a step would revive with it
                weight.grad.masked_fill_(pruned, 0)

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask: pruned weights become 0, revived ones start at 0. Optimizer state made before: mask_optimizer_."""
        check_mask(mask, self.weight.shape)
        with torch.no_grad():
            self.weight_mask.copy_(mask)
        self._obey()

    @property
    def density(self) -> float:
        """Surviving fraction."""
        return self._fresh_pattern().density

    def _fresh_pattern(self) -> SparsePattern:
        if not self._pattern.is_of(self.weight_mask):
            self._obey()
        return self._pattern

    def reset_parameters(self) -> None:
        """Sample weight and bias as nn.Linear does (kaiming_uniform_, a = sqrt(5)), by initperf.init, and apply the mask."""
        from initperf import init

        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features > 0 else 0
            init.uniform_(self.bias, -bound, bound)
        if "weight_mask" in self._buffers:
            self._obey()

    def forward(self, input: Tensor) -> Tensor:
        pattern = self._pattern if torch.compiler.is_compiling() else self._fresh_pattern()
        weight = self.weight
        if not isinstance(input, Tensor):
            fail("an input of type torch.Tensor", type(input).__name__, kind=InitPerfTypeError)
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            fail(
                f"an input whose last dimension is {self.in_features} (in_features)",
                f"shape {tuple(shape)}",
                kind=InitPerfRuntimeError,
            )
        if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            fail(f"an input of the weight's dtype {weight.dtype}", input.dtype, kind=InitPerfRuntimeError)
        flat = input if len(shape) == 2 else input.reshape(math.prod(shape[:-1]), self.in_features)
        # Only the layer's own Parameter is known to obey the mask; a parametrized or functional weight may be anything.
        premasked = isinstance(weight, nn.Parameter)
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            # torch.func's transforms (vmap, jvp, grad) know torch's own product
            return nn.functional.linear(input, weight.masked_fill(~self.weight_mask, 0), self.bias)
        y = masked_ops.linear(flat, weight, self.bias, self.weight_mask, pattern.tensors, premasked)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], self.out_features)

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with copies of the weight, zeros included, and the bias."""
        weight = self.weight
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for name, parameter in linear.named_parameters():
                parameter.copy_(getattr(self, name)).requires_grad_(getattr(self, name).requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.density:.4g}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight_orig":
            fail(
                "a layer without a mask of its own for torch.nn.utils.prune",
                "MaskedLinear (give the new mask to set_mask, or densify the model first)",
                kind=InitPerfRuntimeError,
            )
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pattern"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern = SparsePattern(self.weight_mask)
        _layers.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        before = self.weight_mask
        super()._apply(fn, recurse)
        if self.weight_mask is not before:
            if before.is_meta and not self.weight_mask.is_meta:
                self.weight_mask.fill_(True)  # to_empty: its memory is arbitrary
            self._obey()
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
        original, mask = prefix + "weight_orig", prefix + "weight_mask"
        if original in state_dict and prefix + "weight" not in state_dict:  # torch.nn.utils.prune
            state_dict[prefix + "weight"] = state_dict.pop(original)
        problems = list(self._problems(state_dict, prefix))
        if problems:
            error_msgs.extend(problems)
            return
        if mask in state_dict:
            state_dict[mask] = state_dict[mask].bool()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if mask in missing_keys:  # the checkpoint is dense: the mask that is here stays
            missing_keys.remove(mask)
        if local_metadata.get("assign_to_params_buffers", False) and not self.weight.is_meta:
            with torch.no_grad():  # the checkpoint's own tensors are not edited
                weight = self.weight.masked_fill(~self.weight_mask, 0)
                self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self._obey()

    def _problems(self, state_dict: Mapping[str, Any], prefix: str) -> Iterator[str]:
        """Why the entries for this layer cannot load; nothing of it is touched then."""
        for name in ("weight", "bias", "weight_mask"):
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if own is None or not isinstance(value, Tensor):
                continue
            if value.shape != own.shape:
                yield f"size mismatch for {prefix + name}: Expected shape {tuple(own.shape)}. Got {tuple(value.shape)}."
            elif name == "weight_mask" and not value.is_meta and not bool(((value == 0) | (value == 1)).all()):
                yield f"Expected {prefix + name} to hold only 0 and 1 (True = survives). Got other values, dtype {value.dtype}."


def _check_linear(linear: object, name: str) -> None:
    if not isinstance(linear, nn.Linear):
        fail(f"{name} to be an nn.Linear", type(linear).__name__, kind=InitPerfTypeError)
    if not isinstance(linear._parameters.get("weight"), nn.Parameter):
        fail(
            f"{name} with a weight that is its own Parameter",
            "a pruned or parametrized one (make it permanent first: prune.remove, parametrize.remove_parametrizations)",
            kind=InitPerfRuntimeError,
        )


def masked_layers(model: nn.Module) -> dict[str, MaskedLinear]:
    """Name -> every MaskedLinear of the model, itself included (as "")."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    density: float | Mapping[str, float] | None = None,
    sparse: bool = False,
) -> nn.Module:
    """Turn nn.Linear layers of `model` into masked ones, in place, and return the model.

    masks: {name of a weight, such as "fc1.weight": bool mask}; or density: the fraction of each layer's weights to keep,
    one number for every nn.Linear or {glob of weight names: number}, by magnitude. Masked layers keep their Parameter
    objects. sparse=True, compressed storage, is not in this version and raises. Raises, and changes nothing, for a name
    that is no nn.Linear's weight, a mask of wrong shape or dtype, a weight tied to another parameter, and layers whose
    forward is never called, as in nn.MultiheadAttention.
    """
    check(not sparse, "sparse=False: layers of compressed storage are not in this version", sparse)
    check((masks is None) != (density is None), "either masks or density", "both" if masks is not None else "neither")
    linears = {
        _join(name, "weight"): m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)
    }
    if density is not None:
        masks = _by_magnitude(linears, density)
    if not isinstance(masks, Mapping):
        fail("masks to be a dict of weight name -> bool mask", type(masks).__name__, kind=InitPerfTypeError)
    inside = _attention_internals(model)
    shared = _tied(model)
    for name, mask in masks.items():
        if name not in linears:
            fail(f"the names of nn.Linear weights ({', '.join(linears) or 'the model has none'})", repr(name))
        layer = linears[name]
        _check_linear(layer, name)
        check_mask(mask, layer.weight.shape, f"masks[{name!r}]")
        if id(layer) in inside:
            fail(
                "layers whose forward is called",
                f"{name}, whose weight {inside[id(layer)]} reads itself",
                kind=InitPerfRuntimeError,
            )
        if type(layer) not in (nn.Linear, MaskedLinear):
            fail(
                "plain nn.Linear layers",
                f"{name}, a {type(layer).__name__} (convert it with MaskedLinear.from_linear)",
                kind=InitPerfTypeError,
            )
        if len(shared[id(layer.weight)]) > 1:
            names = " = ".join(shared[id(layer.weight)])
            fail("weights of one layer each", f"the tied weights {names} (leave them out)", kind=InitPerfRuntimeError)
        if layer.weight.dtype not in FLOATS:
            fail(f"{name} to be float32, bfloat16, float16 or float64", layer.weight.dtype)
    for name, mask in masks.items():
        layer = linears[name]
        if isinstance(layer, MaskedLinear):
            layer.set_mask(mask)
        else:
            layer.__class__ = MaskedLinear  # the same module and Parameter objects, so hooks and optimizers stay
            cast(MaskedLinear, layer)._adopt(mask)
    return model


def _by_magnitude(linears: Mapping[str, nn.Linear], density: float | Mapping[str, float]) -> dict[str, Tensor]:
    from initperf import prune

    check(len(linears) > 0, "a model with nn.Linear layers", "none")
    masks: dict[str, Tensor] = {}
    for name, (_, fraction) in prune.fractions_by_name(list(linears), density).items():
        layer = linears[name]
        _check_linear(layer, name)
        old = layer.weight_mask if isinstance(layer, MaskedLinear) else torch.ones_like(layer.weight, dtype=torch.bool)
        survivors, keep = int(old.count_nonzero()), round(fraction * old.numel())
        if keep > survivors:
            fail(f"a density of at most {survivors / old.numel():.4g} for {name}, as it is already pruned", fraction)
        pruned = (survivors - keep) / survivors if survivors else 0.0
        masks |= prune.magnitude({name: layer.weight}, pruned, masks={name: old})
    return masks


def _attention_internals(model: nn.Module) -> dict[int, str]:
    """id of every module inside an nn.MultiheadAttention -> the name of that attention."""
    return {
        id(part): f"{name or 'the model'} (nn.MultiheadAttention)"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()
        if part is not module
    }


def _tied(model: nn.Module) -> dict[int, list[str]]:
    """id of every parameter -> the names of the places that hold it (a module shared as a whole counts once)."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append(_join(name, own))
    return places


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def densify(model: nn.Module) -> nn.Module:
    """Turn masked layers back into nn.Linear, in place, and return the model. Pruned weights are 0 and train again."""
    for layer in masked_layers(model).values():
        layer._buffers.pop("weight_mask")
        layer.__dict__.pop("_pattern", None)
        _layers.discard(layer)
        cast(nn.Module, layer).__class__ = nn.Linear
    return model


def check_masks(model: nn.Module) -> dict[str, float]:
    """Prove that every pruned weight is exactly 0: {layer: density}, or InitPerfRuntimeError naming the layers that are not."""
    layers = masked_layers(model)
    revived = {}
    for name, layer in layers.items():
        count = int(layer.weight.detach().masked_fill(layer.weight_mask, 0).count_nonzero())
        if count:
            revived[name or "the model"] = count
    if revived:
        counts = ", ".join(f"{count} in {name}" for name, count in revived.items())
        fail("pruned weights to be 0", f"nonzero ones: {counts} (see mask_optimizer_)", kind=InitPerfRuntimeError)
    return {name: layer.density for name, layer in layers.items()}


def mask_optimizer_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Keep pruned weights at 0 under any optimizer: their state of the weight's shape, and the weights after every step, are masked.

    Needed for optimizers that mix the elements of a matrix (Muon, Shampoo), and for momentum that is older than the mask.
    Follows later changes of the masks. Returns the optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        fail("a torch.optim.Optimizer", type(optimizer).__name__, kind=InitPerfTypeError)
    if not any(True for _ in _layers_of(optimizer)):
        fail(
            "an optimizer of at least one MaskedLinear's weight", "none (sparsify the model first)", kind=InitPerfError
        )
    _mask_state(optimizer)
    if optimizer not in _masked_optimizers:
        optimizer.register_step_post_hook(lambda opt, args, kwargs: _mask_state(opt))
        _masked_optimizers.add(optimizer)
    return optimizer


def _layers_of(optimizer: torch.optim.Optimizer) -> Iterator[MaskedLinear]:
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return (layer for layer in list(_layers) if id(layer._parameters.get("weight")) in parameters)


@torch.no_grad()
def _mask_state(optimizer: torch.optim.Optimizer) -> None:
    for layer in _layers_of(optimizer):
        pruned = ~layer.weight_mask
        layer.weight.masked_fill_(pruned, 0)
        for value in optimizer.state.get(layer.weight, {}).values():
            if isinstance(value, Tensor) and value.shape == pruned.shape:
                value.masked_fill_(pruned.to(value.device), 0)
