"""What initialize will do with every parameter, decided and checked before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from initperf import rng
from initperf.core.bits import check_bits
from initperf.core.checks import InitPerfTypeError, check, check_float_tensor, check_mask, fail
from initperf.core.torch_private import DisableTorchFunction
from initperf.init import schemes, torch_init
from initperf.init.model import parametrized
from initperf.init.model import transformers as pretrained
from initperf.init.schemes import Init, Place
from initperf.kernels.reference.bits import unpacked
from initperf.rng.sampling import is_plain, is_sharded

Choice = str | Init | rng.Distribution | float | None
Scheme = Choice | Callable[[str, Tensor, nn.Module], Choice]
_CHOICES = f"one of {', '.join(schemes.NAMES)}, as in 'normal(0, 0.02)', an Init, a Distribution, a number or None"


@dataclass
class Task:
    """One parameter and what it will get: a distribution, its present values (keep), or its module's own reset (reset).

    memory: the parameter as its module holds it. A compressed weight holds survivors only, `bits` says which; its
    place's parameter is a meta tensor of the dense shape, so that fans and bounds are those of the dense layer.
    """

    place: Place
    shape: tuple[int, ...]
    memory: Tensor
    bits: Tensor | None = None
    init: Init | None = None
    distribution: rng.Distribution | None = None
    keep: bool = False
    reset: tuple[str, nn.Module, str] | None = None
    ruled: bool = False
    mask: Tensor | None = None
    given: bool = False
    text: str = ""
    pretrained: bool = False
    fallback: Init | None = None

    @property
    def name(self) -> str:
        return self.place.name

    @cached_property
    def stream(self) -> int:
        return rng.stream_of(self.name)

    def unpacked_bits(self) -> Tensor:
        """The mask of a compressed weight, bool, in the dense shape."""
        assert self.bits is not None
        return unpacked(self.bits)[: math.prod(self.shape)].view(self.shape)


def plan(model: nn.Module, scheme: Scheme, rules: Mapping[str, Scheme]) -> list[Task]:
    """A task for every parameter, checked; nothing is touched."""
    tasks: dict[int, Task] = {}
    names: dict[str, str] = {}
    modules = dict(model.named_modules())
    residual = schemes.residual_projections(model)
    directions = {split.v: split for split in parametrized.splits(model)}
    lengths = {split.g: split for split in directions.values()}
    for full, parameter in model.named_parameters():
        name = rng.canonical_name(full)
        if full in directions:
            name = rng.canonical_name(_join(directions[full].path, directions[full].leaf))
        check(bool(name), "parameters with a name", repr(full))
        check(name not in names, "parameters of different names without wrappers' parts", f"{names.get(name)}, {full}")
        names[name] = full
        if isinstance(parameter, UninitializedParameter):
            fail(f"{full} to have a shape: run a forward pass of the lazy module first", "an uninitialized parameter")
        path, leaf = directions[full][2:] if full in directions else _owner(full)
        task = Task(Place(name, parameter, modules[path], path, leaf, residual), tuple(parameter.shape), parameter)
        tasks[id(parameter)] = task if not full.endswith("weight_values") else _compressed(task)
    for pattern in rules:
        check(any(fnmatchcase(n, pattern) for n in names), f"rules to match a parameter of {_some(names)}", pattern)

    by_itself, resets = _own(model, tasks)
    for key, task in tasks.items():
        if names[task.name] in lengths:
            task.keep, task.text = True, f"length of {lengths[names[task.name]].leaf}"
            continue
        chosen = [rule for pattern, rule in rules.items() if fnmatchcase(task.name, pattern)]
        task.ruled = bool(chosen)
        _decide(task, chosen[-1] if chosen else scheme, by_itself.get(key), resets.get(key))
    _check_pretrained(model, list(tasks.values()))
    return list(tasks.values())


def _owner(full: str) -> tuple[str, str]:
    """Module path and canonical leaf of a parameter; a parametrized one belongs to the layer, not to its ParametrizationList."""
    path, _, leaf = full.rpartition(".")
    if leaf == "original" and ".parametrizations." in f".{path}":
        path, _, leaf = path.rpartition(".")
        path = path.rpartition("parametrizations")[0].rstrip(".")
    return path, rng.canonical_name(leaf)


def _compressed(task: Task) -> Task:
    """The task of a `weight_values` parameter, if its module has the buffer `weight_mask_bits` beside it."""
    module: Any = task.place.module
    bits = module._buffers.get("weight_mask_bits")
    if bits is None or not isinstance(getattr(module, "weight_shape", None), (tuple, list)):
        return task
    task.bits, task.shape = bits, tuple(module.weight_shape)
    if not bits.is_meta:
        check_bits(bits, task.shape, task.memory.numel(), f"weight_mask_bits of {task.name}")
    task.place = task.place._replace(parameter=torch.empty(task.shape, dtype=task.memory.dtype, device="meta"))
    return task


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _some(names: Mapping[str, str]) -> str:
    return ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "")


def _own(model: nn.Module, tasks: Mapping[int, Task]) -> tuple[dict[int, Init], dict[int, tuple[str, nn.Module, str]]]:
    """By parameter: its class's own distribution (a parent's word after its child's), or the reset function that sets it."""
    inits: dict[int, Init] = {}
    resets: dict[int, tuple[str, nn.Module, str]] = {}
    named = {(t.place.path, t.place.leaf): key for key, t in tasks.items()}
    for _, module, _ in pretrained.owned(model):
        for parameter in module.parameters(recurse=False):
            if id(parameter) in tasks:
                tasks[id(parameter)].pretrained = True
    for path, module in reversed(list(model.named_modules())):
        reset = schemes.custom_reset(module)
        if reset is not None:
            resets |= {id(p): (path, module, reset) for p in module.parameters(recurse=False) if id(p) in tasks}
            continue
        for below, init in schemes.own(module).items():
            child, leaf = _owner(f"{path}.{below}" if path else below)
            key = named.get((child, leaf))
            if key is not None:
                inits[key] = init
    return inits, resets


def _decide(task: Task, scheme: Scheme, by_itself: Init | None, reset: tuple[str, nn.Module, str] | None) -> None:
    place = task.place
    if getattr(scheme, "__module__", "") in (torch.nn.init.__name__, torch_init.__name__):
        name = getattr(scheme, "__name__", "")
        fail(
            "the scheme as a name, such as 'kaiming_normal', or a function of (name, parameter, module)",
            f"{name}, which fills a tensor",
            kind=InitPerfTypeError,
        )
    choice = scheme(task.name, place.parameter, place.module) if callable(scheme) else scheme
    if isinstance(choice, bool) or not (
        choice is None or isinstance(choice, (str, Init, rng.Distribution, int, float))
    ):
        fail(f"the scheme of {task.name} to be {_CHOICES}", f"{choice!r}", kind=InitPerfTypeError)
    if isinstance(choice, str) and "(" in choice:
        choice = schemes.written(choice)
    if isinstance(choice, str) and choice not in schemes.NAMES:
        fail(f"the scheme of {task.name} to be {_CHOICES}", repr(choice))
    if choice == "keep":
        check(not task.memory.is_meta, f"values to keep in {task.name}", "a parameter on the meta device")
        task.keep, task.text, task.pretrained = True, "kept", False
        return
    check_float_tensor(place.parameter, task.name)
    with DisableTorchFunction():  # torch.device as a context keeps no parameter from being plain
        if not (is_plain(task.memory) or task.memory.is_meta or is_sharded(task.memory)):
            fail(f"{task.name} to be a plain tensor, or scheme 'keep'", type(task.memory).__name__)
        if task.bits is not None and is_sharded(task.memory):
            fail(f"{task.name}, a compressed weight, to be whole, or scheme 'keep'", type(task.memory).__name__)
    if isinstance(choice, rng.Distribution):
        task.distribution, task.text, task.pretrained = choice, f"kind {choice.kind} {choice.params}", False
        return
    if choice in (None, "torch"):
        if task.pretrained:
            task.fallback, task.text = by_itself, "_init_weights() of its transformers model"
            return
        if reset is not None:
            task.reset, task.text = reset, f"{type(reset[1]).__name__}.{reset[2]}()"
            return
        task.init = by_itself
    elif isinstance(choice, Init):
        task.init = choice.check(task.name)
    elif isinstance(choice, str):
        task.init = schemes.named(choice, place, by_itself, task.ruled and not task.pretrained)
    else:
        task.init = schemes.constant(float(choice))
    if task.init is None and task.pretrained:
        task.text = "_init_weights() of its transformers model"
        return
    task.pretrained = False
    if task.init is None:
        fail(
            f"a rule for {task.name}, a parameter of shape {task.shape} of {type(place.module).__name__}, which "
            f"scheme {choice!r} says nothing about (rules={{{task.name!r}: ...}})",
            "none",
        )
    if task.init.function == "orthogonal":
        check(len(task.shape) >= 2, f"two dimensions or more for orthogonal {task.name}", task.shape)
    elif place.parameter.numel():
        task.distribution = task.init.distribution(place.parameter.dtype)
    task.text = str(task.init)


def _attribute(module: nn.Module, name: str) -> Any:
    """getattr(module, name, None), without the microsecond that nn.Module takes to say that there is none."""
    if name in module._buffers:
        return module._buffers[name]
    known = name in module.__dict__ or name in module._parameters or hasattr(type(module), name)
    return getattr(module, name, None) if known else None


def _check_pretrained(model: nn.Module, tasks: list[Task]) -> None:
    """On the meta device every parameter must get values, which a run without memory shows. Elsewhere it may keep its own."""
    missing = [t for t in tasks if t.pretrained and t.fallback is None and t.place.parameter.is_meta]
    if missing:
        written = pretrained.rehearsed(model)
        for task in missing:
            check(
                id(task.place.parameter) in written,
                f"a rule for {task.name}, of which `_init_weights` says nothing (rules={{{task.name!r}: ...}})",
                "none",
            )


def attach_masks(tasks: list[Task], masks: Mapping[str, Tensor], rescale: str | None) -> None:
    """Each task's mask: the one given, else its layer's own `<name>_mask`. Checks what `rescale` needs."""
    known = {t.name: t for t in tasks}
    names = [rng.canonical_name(name) for name in masks]
    for name, mask in zip(names, masks.values(), strict=True):
        check(name in known, f"masks of parameters of the model ({_some(dict.fromkeys(known, ''))})", name)
        check(names.count(name) == 1, f"one mask for {name}", names.count(name))
        check_mask(mask, known[name].shape, f"masks[{name!r}]")
        check(known[name].bits is None, f"no mask for {name}, a compressed weight, which has its own", "one")
        memory = known[name].memory
        known[name].mask, known[name].given = mask if memory.is_meta else mask.to(memory.device), True
    for task in tasks:
        own = None if task.bits is not None else _attribute(task.place.module, f"{task.place.leaf}_mask")
        if not task.given and isinstance(own, Tensor) and tuple(own.shape) == task.shape and not own.is_meta:
            task.mask = own if own.dtype == torch.bool else own != 0
        if (task.mask is None and task.bits is None) or task.keep or rescale is None:
            continue
        if rescale != "layer" and is_sharded(task.memory):
            fail(f'rescale="layer" for {task.name}, which is sharded', repr(rescale))
        if rescale == "measured" and task.bits is not None:
            fail(f'rescale="layer", "unit" or "squares" for {task.name}, a compressed weight', repr(rescale))
        if rescale == "layer" and task.init is None:
            fail(f'a distribution of {task.name} for rescale="layer" (a scheme or an Init)', task.text)
        if task.bits is not None and task.distribution is None and task.memory.numel():
            fail(f"a distribution of {task.name} for rescale={rescale!r}", task.text)
