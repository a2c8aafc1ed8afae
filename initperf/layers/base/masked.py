"""MaskedLayer: what every layer with a dense weight and a mask has in common, whatever its product is.

The weight is exactly zero where the mask is False, and its gradient must be exactly zero there too (the layer's forward sees
to that), so elementwise optimizers (SGD, Adam and kin) never revive a weight.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from initperf.core.bits import unpack_bits
from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_mask, check_mask_has_data, fail
from initperf.layers.base.pattern import Pattern, SparsePattern

if TYPE_CHECKING:
    from typing_extensions import Self

M = TypeVar("M", bound=nn.Module)
_UNSAVED = ("_pattern", "_probes", "_seen", "_words", "_own", "_kept")  # made anew in a copy
LAYERS: weakref.WeakSet[MaskedLayer] = weakref.WeakSet()  # all that live: optimizers know only their parameters


class MaskedLayer(nn.Module):
    """A mixin before the dense class: a persistent bool buffer `weight_mask` of the weight's shape, True = survives.

    A subclass sets DENSE and ATTRIBUTES, calls _adopt(mask) at the end of its __init__, and multiplies in its forward by
    what _fresh_pattern() returns: the index of weight_mask.flatten(1), one row an output.
    """

    DENSE: ClassVar[type[nn.Module]]
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # of DENSE, all but parameters

    weight: Tensor
    weight_mask: Tensor
    _pattern: Pattern
    _probes: tuple[int, ...]  # positions of pruned weights
    _seen: tuple[int, int, tuple[int, ...]] | None  # the weight when it last obeyed
    _words: tuple[Any, ...] = ()  # its memory at the probes
    _magnitude = 0  # bits of a word but for the sign
    _own: weakref.ref[Any] | None = None  # the weight that obeys

    @classmethod
    def on(cls, dense: nn.Module, mask: Tensor | None = None) -> Self:
        """A masked layer on the same Parameter objects as `dense`, so an optimizer made before keeps working; they are masked in place."""
        check_own_weight(dense, cls.DENSE, cls.DENSE.__name__.lower())
        weight: Any = dense.weight
        if mask is not None:
            check_mask(mask, weight.shape)
            check_mask_has_data(mask, weight)
        layer = cls._shell(dense)
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", dense._parameters["bias"])
        layer._adopt(mask)
        return layer

    @classmethod
    def from_dense(cls, module: nn.Module) -> Self:
        """What torch.ao.pruning's convert calls: the mask is that of its sparsifier, or what is not zero in the weight."""
        weight: Any = module.weight
        parametrizations: Any = getattr(module, "parametrizations", {})
        if "weight" not in parametrizations:
            return cls.on(module, weight != 0)
        steps = parametrizations["weight"]
        dense = new_module(cls.DENSE, module, cls.ATTRIBUTES)
        dense.register_parameter("weight", steps.original)
        dense.register_parameter("bias", module._parameters["bias"])
        masks = [step.mask for step in steps if isinstance(getattr(step, "mask", None), Tensor)]
        return cls.on(dense, masks[0].bool() if masks else weight != 0)

    @classmethod
    def _shell(cls, source: nn.Module) -> Self:
        return new_module(cls, source, cls.ATTRIBUTES)

    def to_dense(self) -> nn.Module:
        """The dense layer, with copies of the weight, zeros included, and the bias."""
        dense = new_module(self.DENSE, self, self.ATTRIBUTES)
        for name in ("weight", "bias"):
            value = getattr(self, name)
            copy = None if value is None else nn.Parameter(value.detach().clone(), value.requires_grad)
            dense.register_parameter(name, copy)
        return dense

    def _adopt(self, mask: Tensor | None) -> None:
        """Take `mask` (checked) as the buffer, and make the weight obey it."""
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        else:
            mask = torch.empty_like(self.weight, dtype=torch.bool, memory_format=torch.contiguous_format).copy_(mask)
        self.register_buffer("weight_mask", mask)
        self._obey()
        LAYERS.add(self)

    def _forget(self) -> None:
        """Drop what makes it a masked layer; the caller sets its class."""
        self._buffers.pop("weight_mask")
        for name in _UNSAVED:
            self.__dict__.pop(name, None)
        LAYERS.discard(self)

    @torch.no_grad()
    def _obey(self) -> None:
        """Zero the pruned weights, and build what the kernels read, after the mask or the weight was replaced."""
        if self.weight.dtype not in FLOATS:
            fail("a weight of float32, bfloat16, float16 or float64", self.weight.dtype)
        if self.weight_mask.dtype != torch.bool:
            self.weight_mask = self.weight_mask.bool()
        self.__dict__.pop("_kept", None)
        self._pattern = self._new_pattern()
        self._probes = _pruned_places(self.weight_mask)
        self._mask_weight()

    @torch.no_grad()
    def _mask_weight(self) -> None:
        self._pattern.way = None
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_meta and self._pattern.nnz < weight.numel():
            pruned = ~self.weight_mask
            weight.masked_fill_(pruned, 0)
            if weight.grad is not None:  # from before the mask: a step would revive with it
                weight.grad.masked_fill_(pruned, 0)
        self._see(weight)
        self._own = weakref.ref(weight) if weight is not None else None

    def _is_own(self, weight: object) -> bool:
        """Whether this is the layer's own Parameter, which obeys the mask; a parametrized or functional weight may be anything."""
        if torch.compiler.is_compiling():  # which does not follow weak references
            return isinstance(weight, nn.Parameter)
        own = self._own
        return own is not None and own() is weight

    def _overwritten(self) -> bool:
        """Whether the weight, which was written since it last obeyed, was written past the mask; the dense product would show it.

        By an init function, copy_, `weight[i] = `, `.data = ` and so on. Told on the CPU: elsewhere it would wait for the device.
        """
        weight = self._parameters.get("weight")
        if weight is None or not self._probes or not self._is_own(weight):
            return False
        if (state := _state_of(weight)) is None or state == self._seen:
            return False
        if weight.shape != self.weight_mask.shape:
            fail(
                f"a weight of the mask's shape {tuple(self.weight_mask.shape)}",
                tuple(weight.shape),
                kind=InitPerfRuntimeError,
            )
        self._see(weight)
        return bool(weight.data_ptr()) and self._pattern.is_broken_by(weight)

    def _see(self, weight: Tensor | None) -> None:
        """Remember the weight as it is, and where its probes lie."""
        self._seen, self._words = _state_of(weight), ()
        if self._probes and weight is not None and self._seen is not None and self._seen[1]:
            self._words = tuple(_word_at(weight, place) for place in self._probes)
            self._magnitude = (1 << (8 * weight.element_size() - 1)) - 1

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask: pruned weights become 0, revived ones start at 0. Optimizer state made before: mask_optimizer_."""
        check_mask(mask, self.weight.shape)
        check_mask_has_data(mask, self.weight_mask)
        old = self.weight_mask
        if not old.is_meta and torch.equal(mask.to(old.device), old) and self._pattern.is_of(old):
            self._mask_weight()
            return
        with torch.no_grad():
            old.copy_(mask)
        self._obey()

    @property
    def density(self) -> float:
        """Surviving fraction."""
        return self._fresh_pattern().density

    def _new_pattern(self) -> Pattern:
        """What the mask means to the kernels of this layer."""
        return SparsePattern(self.weight_mask)

    def _fresh_pattern(self) -> Pattern:
        pattern, mask = self._pattern, self._buffers["weight_mask"]
        if not pattern.is_of(mask):  # type: ignore[arg-type]
            self._obey()
            return self._pattern
        seen, weight = self._seen, self._parameters.get("weight")
        state = None
        if seen is not None and type(weight) is nn.Parameter:
            # The usual case, sooner told.
            try:  # noqa: SIM105 - contextlib takes longer
                state = weight._version, weight.data_ptr(), weight.stride()
            except RuntimeError:  # inference tensors have no version
                pass
            if state == seen:
                found = 0
                for word in self._words:  # `.data` and NumPy write unseen: what they write everywhere shows here
                    found |= word.value
                if found & self._magnitude:
                    self._mask_weight()
                return pattern
        if state is None or seen is None or state[1:] != seen[1:]:
            pattern.way = None
        if self._overwritten():
            self._mask_weight()
        return pattern

    def reset_parameters(self) -> None:
        """Sample weight and bias as the dense layer does (kaiming_uniform_, a = sqrt(5)), by initperf.init, and apply the mask."""
        reset_as_dense(self.weight, self._parameters.get("bias"))
        if "weight_mask" in self._buffers:
            self._obey()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.density:.4g}"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight_orig":
            fail(
                "a layer without a mask of its own for torch.nn.utils.prune",
                f"{self.__class__.__name__} (give the new mask to set_mask, or densify the model first)",
                kind=InitPerfRuntimeError,
            )
        super().register_parameter(name, param)
        mask = self.__dict__.get("_buffers", {}).get("weight_mask")
        if name != "weight" or param is None or mask is None or param.shape != mask.shape:
            return
        if not self.__dict__.get("_loading"):  # a checkpoint's own tensors are not edited
            self._mask_weight()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _UNSAVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern, self._probes, self._seen = self._new_pattern(), _pruned_places(self.weight_mask), None
        self._words = ()
        self._own = weakref.ref(self.weight)
        LAYERS.add(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.weight_mask
        self.__dict__.pop("_kept", None)
        super()._apply(fn, recurse)
        self._pattern.way = None
        self._own = weakref.ref(self._parameters["weight"]) if self._parameters.get("weight") is not None else None
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
        dense_entries(state_dict, prefix, self.weight.shape)
        problems = list(self._problems(state_dict, prefix))
        if problems:
            error_msgs.extend(problems)
            return
        if mask in state_dict:
            state_dict[mask] = state_dict[mask].bool()
        self._loading = True
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            del self._loading
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


def new_module(kind: type[M], source: nn.Module, attributes: tuple[str, ...]) -> M:
    """A module of class `kind` with the attributes and the mode of `source`, and no parameters yet."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.training = source.training
    for name in attributes:
        setattr(module, name, getattr(source, name))
    return module


def dense_entries(state_dict: dict[str, Any], prefix: str, shape: torch.Size) -> None:
    """Turn the entries of a compressed layer into `weight` and `weight_mask`, where their sizes fit each other."""
    values, bits = state_dict.get(prefix + "weight_values"), state_dict.get(prefix + "weight_mask_bits")
    if values is None or bits is None or bits.numel() != -(-shape.numel() // 8):
        return
    mask = unpack_bits(bits, shape)
    if int(mask.count_nonzero()) != values.numel():
        return
    del state_dict[prefix + "weight_values"], state_dict[prefix + "weight_mask_bits"]
    state_dict[prefix + "weight"] = values.new_zeros(shape).masked_scatter_(mask, values)
    state_dict[prefix + "weight_mask"] = mask


def check_own_weight(layer: object, dense: type[nn.Module], name: str) -> None:
    """`layer` is a `dense`, and its weight is a Parameter of its own."""
    if not isinstance(layer, dense):
        kind = dense.__name__ if issubclass(dense, MaskedLayer) else f"nn.{dense.__name__}"
        fail(f"{name} to be an {kind}", type(layer).__name__, kind=InitPerfTypeError)
    if not isinstance(layer._parameters.get("weight"), nn.Parameter):
        fail(
            f"{name} with a weight that is its own Parameter",
            "a pruned or parametrized one (make it permanent first: prune.remove, parametrize.remove_parametrizations)",
            kind=InitPerfRuntimeError,
        )


def reset_as_dense(weight: Tensor, bias: Tensor | None) -> None:
    """What nn.Linear and nn.Conv2d sample: kaiming_uniform_ with a = sqrt(5), and a bias of the same bound, 1 / sqrt(fan_in)."""
    from initperf import init

    init.kaiming_uniform_(weight, a=5**0.5)
    if bias is not None:
        fan_in = weight[0].numel() if len(weight) else 0
        bound = fan_in**-0.5 if fan_in > 0 else 0
        init.uniform_(bias, -bound, bound)


def _pruned_places(mask: Tensor) -> tuple[int, ...]:
    """The first, a middle and the last position that a mask on the CPU prunes; () if it prunes none, or lies elsewhere."""
    if mask.device.type != "cpu" or type(mask) is not Tensor or not mask.numel():
        return ()
    flat = mask.detach().reshape(-1).numpy()
    half = len(flat) // 2
    found = (int(flat.argmin()), half + int(flat[half:].argmin()), len(flat) - 1 - int(flat[::-1].argmin()))
    return tuple(sorted({place for place in found if not flat[place]}))


def _state_of(weight: Tensor | None) -> tuple[int, int, tuple[int, ...]] | None:
    """What changes whenever a plain tensor on the CPU is written or gets other memory; None for others."""
    if type(weight) is not nn.Parameter or not weight.is_cpu:
        return None
    return -1 if weight.is_inference() else weight._version, weight.data_ptr(), weight.stride()


_WORDS: dict[int, Any] = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


def _word_at(weight: Tensor, place: int) -> Any:
    """The memory of the value at a row-major position: reading it takes a tenth of an op of torch."""
    size, offset = weight.element_size(), place
    if not weight.is_contiguous():
        offset = 0
        for length, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
            place, at = divmod(place, length)
            offset += at * stride
    return _WORDS[size].from_address(weight.data_ptr() + offset * size)
