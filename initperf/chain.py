"""SparseSequential: an nn.Sequential whose small compressed layers run as one call in inference."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from initperf import choice, direct, ops
from initperf.checks import FLOATS
from initperf.masked import check_input
from initperf.pattern import Pattern
from initperf.sparse import SparseLinear

LARGEST = 1 << 18  # survivors of a run: more leave a core's caches, and what surrounds their products no longer counts
TRIES = 10
SPARSEST = 64  # weights for one survivor: rows and column blocks without any take time, too
SKIPPED = (nn.Identity, nn.Dropout)  # the latter in evaluation
Part = Callable[[Tensor], Tensor]
ops.register("sparse_chain", "chain")


class SparseSequential(nn.Sequential):
    """nn.Sequential with the same children and state_dict, where SparseLinear layers (at most 2**18 survivors together) and ReLU that
    follow one another are computed by one call of a kernel wherever no gradient is wanted (torch.no_grad, torch.inference_mode).

    sparsify(..., sparse=True) makes it of every plain nn.Sequential that holds compressed linear layers, densify an
    nn.Sequential again. In training, with hooks on a child, under autocast, transforms, compilation and not on the CPU,
    every child is called as usual. Same results within rounding.
    """

    _parts: _Parts | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return super().forward(input)
        children = tuple(self._modules.values())
        kinds, parts = tuple(map(type, children)), self._parts
        if parts is None or parts.children != children or parts.kinds != kinds:
            parts = self._parts = _Parts.of(children)
        if parts.observed():
            return super().forward(input)
        for part in parts.parts:
            input = part(input)
        return input

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_parts"}


def fuse(module: nn.Module) -> None:
    """Make a plain nn.Sequential with compressed linear layers among its children a SparseSequential, and the reverse without any."""
    compressed = any(isinstance(child, SparseLinear) for child in module._modules.values())
    if compressed and type(module) is nn.Sequential:
        module.__class__ = SparseSequential
    elif not compressed and type(module) is SparseSequential:
        module.__dict__.pop("_parts", None)
        cast(nn.Module, module).__class__ = nn.Sequential


class _Parts(NamedTuple):
    """The children of a SparseSequential as they are computed: alone, or several as a run."""

    children: tuple[nn.Module | None, ...]
    kinds: tuple[type, ...]
    parts: list[Part]
    in_runs: list[nn.Module]

    @classmethod
    def of(cls, children: Sequence[nn.Module | None]) -> _Parts:
        parts: list[Part] = []
        run: list[nn.Module] = []

        def close() -> None:
            if sum(type(m) not in SKIPPED for m in run) > 1:
                parts.append(_Run(list(run)))
            else:
                parts.extend(run)
            run.clear()

        for child in children:
            if child is None:  # nn.Sequential raises when it comes there
                close()
                parts.append(cast(Part, None))
                continue
            starts = type(child) is SparseLinear and child.nnz <= LARGEST
            follows = type(child) is nn.ReLU or type(child) in SKIPPED
            if not starts and not (run and follows):
                close()
                parts.append(child)
                continue
            nnz = sum(m.nnz for m in (*run, child) if isinstance(m, SparseLinear))
            if nnz > LARGEST:
                close()
            run.append(child)
        close()
        kinds = tuple(map(type, children))
        return cls(tuple(children), kinds, parts, [m for p in parts if isinstance(p, _Run) for m in p.modules])

    def observed(self) -> bool:
        """Whether something must see the children called: hooks, a forward of their own, dropout at work."""
        if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return True
        for module in self.in_runs:
            state = module.__dict__
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return True
            if state["training"] and type(module) is nn.Dropout:
                return True
        return False


class _Run:
    """Layers of a SparseSequential that are computed together."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.layers: list[SparseLinear] = [m for m in modules if isinstance(m, SparseLinear)]
        kinds = [type(m) for m in modules if type(m) not in SKIPPED]
        self.relus = [
            after is nn.ReLU for kind, after in zip(kinds, [*kinds[1:], None], strict=True) if kind is SparseLinear
        ]
        self.plan: Any = None
        self.lock = threading.Lock()
        self.patterns: list[Pattern] = []
        self.seen: list[Any] = []  # addresses and dtypes

    def __call__(self, x: Tensor) -> Tensor:
        y = self._together(x)
        if y is None:
            y = x
            for module in self.modules:
                y = module(y)
        return y

    def _together(self, x: Tensor) -> Tensor | None:
        """What the layers make of x; None where they are to be called one by one."""
        if not isinstance(x, Tensor) or not x.is_cpu or not direct.plain(x) or (plan := self._current()) is None:
            return None
        shape = x.shape
        check_input(x, plan.inputs, plan.dtype, True)
        flat = x if len(shape) == 2 else x.reshape(math.prod(shape[:-1]), plan.inputs)
        rows = flat.shape[0]
        if not rows or not choice.chain_pays(rows, plan.weights, plan.nnz, plan.dtype):
            return None
        flat, y = flat.contiguous(), torch.empty(rows, plan.outputs, dtype=plan.dtype)
        for _ in range(TRIES):
            if plan(flat, y):
                break
            old, plan = plan, plan.prepared(rows)
            with self.lock:
                if self.plan is old:
                    self.plan = plan
        else:  # another thread keeps writing the values
            return None
        ops.CALLS["sparse_chain", "numba"] += 1
        return y if len(shape) == 2 else y.reshape(*shape[:-1], plan.outputs)

    def _current(self) -> Any:
        """The plan for masks and parameters as they are; None where there can be none."""
        patterns: list[Pattern] = []
        seen: list[Any] = []
        for layer in self.layers:
            found = layer._parameters
            if "weight_values" not in found or "bias" not in found:  # parametrized
                return None
            values, bias = cast(Tensor, found["weight_values"]), found["bias"]
            patterns.append(layer._fresh_pattern())
            seen += (values.data_ptr(), values.dtype, 0 if bias is None else bias.data_ptr())
        if patterns != self.patterns or seen != self.seen:
            plan = self._new_plan()
            with self.lock:
                self.plan, self.patterns, self.seen = plan, patterns, seen
            return plan
        return self.plan

    def _new_plan(self) -> Any:
        dtype = self.layers[0].weight_values.dtype
        if ops.backend_of("sparse_chain", "cpu") == "reference" or dtype not in FLOATS:
            return None
        found = []
        for layer, relu in zip(self.layers, self.relus, strict=True):
            values, bias, pattern = layer.weight_values, layer.bias, layer._pattern
            tensors = [values] if bias is None else [values, bias]
            if not all(t.is_cpu and t.dtype == dtype and t.is_contiguous() for t in tensors):
                return None
            if not values.numel() or values.numel() != pattern.nnz:
                return None
            if bias is not None and bias.shape != (layer.out_features,):
                return None
            mask = layer.weight_mask
            index = pattern.tensors or ops.implementation("sparse_tensors", "cpu")(mask)
            found.append((values.detach(), None if bias is None else bias.detach(), mask, index[:3], relu))
        if sum(values.numel() for values, *_ in found) > LARGEST:
            return None
        if sum(mask.numel() for _, _, mask, *_ in found) > SPARSEST * LARGEST:
            return None
        if any(a.out_features != b.in_features for a, b in pairwise(self.layers)):
            return None
        from initperf.kernels.cpu.chain import Plan

        return Plan(found)
