"""A device without kernels, for tests: torch's PrivateUse1 as a Python backend, with plain tensors whose memory only torch's ops can reach.

Like MPS it has no float64. Addresses that its tensors show are not mapped: a kernel of the host that is handed one crashes.
Each op of torch runs on the CPU, on a tensor with the same memory, and OPS remembers its name.
Importing this turns the device on for the whole process: import it in a subprocess.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fake"
OPS: set[str] = set()
STATES: list[list[int]] = []  # states of its random numbers that were put back
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_addresses = itertools.count(1 << 60, 1 << 40)  # beyond what a process can map
_memory: dict[int, Tensor] = {}  # address -> bytes on the CPU


class _Backend:
    """The module torch.fake."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=NAME: torch.tensor([7], dtype=torch.uint8))
    set_rng_state = staticmethod(lambda state, device=NAME: STATES.append(state.tolist()))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


def _refuse_float64(dtype: torch.dtype) -> None:
    if dtype in (torch.float64, torch.complex128):
        raise TypeError("Cannot convert a fake Tensor to float64 dtype as the fake framework doesn't support float64.")


def _owning(bytes_: Tensor, dtype: torch.dtype, size: Any, stride: Any, offset: int = 0) -> Tensor:
    """A tensor of the device with this memory."""
    _refuse_float64(dtype)
    tensor = torch._C._acc.create_empty_tensor([0], dtype)
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, _storage(bytes_), offset, size, stride)
    return tensor


def _storage(bytes_: Tensor) -> torch.UntypedStorage:
    address = next(_addresses)
    _memory[address] = bytes_
    return torch._C._construct_storage_from_data_pointer(address, DEVICE, bytes_.numel())


def _shadow(tensor: Tensor) -> Tensor:
    """The CPU's tensor with the memory of a tensor of the device."""
    if tensor.device.type != NAME:
        return tensor
    bytes_ = _memory[tensor.untyped_storage().data_ptr()]
    whole = bytes_[: bytes_.numel() // tensor.element_size() * tensor.element_size()].view(tensor.dtype)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _to_device(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cpu":
        return tensor
    storage = tensor.untyped_storage()
    bytes_ = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    return _owning(bytes_, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    OPS.add(op.name())
    returns = op._schema.returns
    if op.name().startswith("aten::set_"):  # of a tensor's memory, in place
        return op.redispatch(_CPU, *args, **kwargs)
    if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):  # a view: no values are read
        return op.redispatch(_CPU, *args, **kwargs)
    made_here = kwargs.get("device") is None or torch.device(kwargs["device"]).type == NAME
    if kwargs.get("device") is not None and made_here:
        kwargs["device"] = torch.device("cpu")
    if "dtype" in kwargs and kwargs["dtype"] is not None and made_here:
        _refuse_float64(kwargs["dtype"])
    shadows = {id(t): _shadow(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
    given, named = tree_map_only(Tensor, lambda t: shadows[id(t)], ([*args], kwargs))
    for i, argument in enumerate(op._schema.arguments[: len(args)]):  # numbers, which torch makes tensors of on the way
        if argument.type.kind() == "TensorType" and isinstance(args[i], (int, float)):
            given[i] = torch.tensor(args[i], device="cpu")
    result = op(*given, **named)
    if any(r.alias_info is not None for r in returns):  # in place, or out=
        written = [v for v, a in zip(args, op._schema.arguments, strict=False) if a.alias_info is not None]
        written += [kwargs[a.name] for a in op._schema.arguments if a.alias_info is not None and a.name in kwargs]
        for tensor in written:
            if tensor.device.type == NAME and (shadow := shadows[id(tensor)]).shape != tensor.shape:
                _take(tensor, _to_device(shadow))  # an empty out=, which the op gave its shape
        return written[0] if len(returns) == 1 else tuple(written)
    return tree_map(lambda v: _to_device(v) if isinstance(v, Tensor) and made_here else v, result)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    OPS.add("aten::_copy_from")
    _shadow(target).copy_(_shadow(source))
    return target


def _take(tensor: Tensor, other: Tensor) -> None:
    """Give a tensor the memory of another."""
    torch.ops.aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, tensor, other.untyped_storage(), other.storage_offset(), other.shape, other.stride()
    )


def _resize_(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    """Only of what was just made for an out=: its values need not stay."""
    if tuple(tensor.shape) != tuple(size):
        _take(tensor, torch.empty(size, dtype=tensor.dtype, device=DEVICE))
    return tensor


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    OPS.add("aten::convolution")
    shadows = tree_map_only(Tensor, _shadow, (x, weight, bias))
    return _to_device(torch.ops.aten.convolution(*shadows, *rest))


def _convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    OPS.add("aten::convolution_backward")
    *geometry, wanted = rest
    shadows = tree_map_only(Tensor, _shadow, (dy, x, weight))
    found = torch.ops.aten.convolution_backward(*shadows, [weight.shape[0]], *geometry, wanted)
    return tuple(None if g is None else _to_device(g) for g in found)


_clone = torch.UntypedStorage.clone


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """What copy.deepcopy of a tensor calls."""
    if storage.device.type != NAME:
        return _clone(storage)
    return _storage(_memory[storage.data_ptr()].clone())


torch.UntypedStorage.clone = _clone_storage
_everything = torch.library.Library("_", "IMPL")
_everything.fallback(_run, "PrivateUse1")
_everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_own = torch.library.Library("aten", "IMPL")
_own.impl("_copy_from", _copy_from, "PrivateUse1")
_own.impl("resize_", _resize_, "PrivateUse1")
_own.impl("convolution_overrideable", _convolution, "PrivateUse1")
_own.impl("convolution_backward_overrideable", _convolution_backward, "PrivateUse1")
