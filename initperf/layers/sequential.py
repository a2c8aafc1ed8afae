"""SparseSequential: an nn.Sequential whose small compressed layers run as one call, in inference and in training."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from initperf.core import ops, without_dispatch
from initperf.core.checks import FLOATS
from initperf.core.torch_private import (
    global_backward_hooks,
    global_backward_pre_hooks,
    global_forward_hooks,
    global_forward_pre_hooks,
)
from initperf.layers.base.pattern import Pattern
from initperf.layers.choice import table as choice
from initperf.layers.linear import SparseLinear, check_input
from initperf.layers.ops import chain as chain_ops
from initperf.layers.ops.chain import Parameters

LARGEST = 1 << 18  # survivors of a run: more leave a core's caches, and what surrounds their products no longer counts
TRIES = 10
SPARSEST = 64  # weights for one survivor: rows and column blocks without any take time, too
SKIPPED = (nn.Identity, nn.Dropout)  # the latter in evaluation
Part = Callable[[Tensor], Tensor]
ops.register("sparse_chain", "chain.inference")


class SparseSequential(nn.Sequential):
    """nn.Sequential with the same children and state_dict, where SparseLinear layers (at most 2**18 survivors together) and ReLU that
    follow one another are computed by one call of a kernel, and in training their gradients by another.

    sparsify(..., sparse=True) makes it of every plain nn.Sequential that holds compressed linear layers, densify an
    nn.Sequential again. With hooks on a child, Dropout at work, under autocast, transforms, compilation and not on the CPU,
    every child is called as usual. Same results within rounding.
    """

    _parts: _Parts | None = None

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
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
        if global_forward_hooks or global_forward_pre_hooks or global_backward_hooks or global_backward_pre_hooks:
            return True
        for module in self.in_runs:
            state = module.__dict__
            if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return True
            if state["_backward_hooks"] or state["_backward_pre_hooks"]:
                return True
            if state["training"] and type(module) is nn.Dropout:
                return True
        return False


class _Plans:
    """What the kernels know of a run with masks as they are, made when first asked for."""

    def __init__(self, patterns: list[Pattern]) -> None:
        self.patterns = patterns
        self.lock = threading.Lock()
        self.inference: tuple[Any, Any] = None, None  # addresses and dtypes of the parameters, and the plan for them
        self.training: dict[torch.dtype, chain_ops.Run | None] = {}


class _Run:
    """Layers of a SparseSequential that are computed together."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.layers: list[SparseLinear] = [m for m in modules if isinstance(m, SparseLinear)]
        kinds = [type(m) for m in modules if type(m) not in SKIPPED]
        self.relus = [
            after is nn.ReLU for kind, after in zip(kinds, [*kinds[1:], None], strict=True) if kind is SparseLinear
        ]
        self.plans = _Plans([])

    def __call__(self, x: Tensor) -> Tensor:
        y = self._together(x)
        if y is None:
            y = x
            for module in self.modules:
                y = module(y)
        return y

    def _together(self, x: Tensor) -> Tensor | None:
        """What the layers make of x; None where they are to be called one by one."""
        if not isinstance(x, Tensor) or not x.is_cpu or not without_dispatch.plain(x):
            return None
        patterns: list[Pattern] = []
        parameters: list[Tensor | None] = []
        for layer in self.layers:
            found = layer._parameters
            if (
                found.get("weight_values") is None or "bias" not in found
            ):  # parametrized, or an error of the layer's own
                return None
            patterns.append(layer._fresh_pattern())
            parameters += found["weight_values"], found["bias"]
        plans = self.plans
        if patterns != plans.patterns:
            plans = self.plans = _Plans(patterns)
        if torch.is_grad_enabled():
            for p in (x, *parameters):
                if p is not None and p.requires_grad:
                    return self._train(x, plans, parameters)
        return self._infer(x, plans, parameters)

    def _infer(self, x: Tensor, plans: _Plans, parameters: Parameters) -> Tensor | None:
        seen: list[Any] = []
        for p in parameters:
            if p is None:
                seen.append(None)
            elif p.is_neg():  # a sign that kernels would not see
                return None
            else:
                seen += p.data_ptr(), p.dtype
        known, plan = plans.inference
        if seen != known:
            plan = self._inference_plan()
            with plans.lock:
                plans.inference = seen, plan
        if plan is None:
            return None
        flat = _flat(x, plan)
        rows = flat.shape[0]
        if not rows or not choice.chain_pays(rows, plan.weights, plan.nnz, plan.dtype):
            return None
        flat, y = flat.contiguous(), x.new_empty(rows, plan.outputs)
        for _ in range(TRIES):
            if plan(flat, y):
                break
            old, plan = plan, plan.prepared(rows)
            with plans.lock:
                if plans.inference[1] is old:
                    plans.inference = seen, plan
        else:  # another thread keeps writing the values
            return None
        ops.CALLS["sparse_chain", "numba"] += 1
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], plan.outputs)

    def _train(self, x: Tensor, plans: _Plans, parameters: Parameters) -> Tensor | None:
        dtype = self.layers[0].weight_values.dtype
        if dtype not in plans.training:
            run = self._training_run(plans.patterns, dtype)
            with plans.lock:
                plans.training[dtype] = run
        if (run := plans.training[dtype]) is None:
            return None
        plan = run.plan
        flat = _flat(x, plan)
        rows = flat.shape[0]
        if not (rows and choice.chain_trains(len(self.layers), rows, plan.weights, plan.nnz)):
            return None
        if not chain_ops.fits(run, parameters):
            return None
        for layer, values in zip(self.layers, parameters[::2], strict=True):
            layer.leave_inference(cast(Tensor, values))
        y = chain_ops.train(run, flat.contiguous(), parameters)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], plan.outputs)

    def _may_run(self, dtype: torch.dtype) -> bool:
        """Whether kernels for layers with these masks exist, and none is so sparse or large that they would be slow."""
        if ops.backend_of("sparse_chain", "cpu") == "reference" or dtype not in FLOATS:
            return False
        nnz, weights = sum(m.nnz for m in self.layers), sum(math.prod(m.weight_shape) for m in self.layers)
        if not all(m.nnz for m in self.layers) or nnz > LARGEST or weights > SPARSEST * LARGEST:
            return False
        return all(a.out_features == b.in_features for a, b in pairwise(self.layers))

    def _index(self, layer: SparseLinear) -> list[Tensor]:
        """Six tensors, also where no single layer needs them."""
        return layer._pattern.tensors or ops.implementation("sparse_tensors", "cpu")(layer.weight_mask)

    def _training_run(self, patterns: list[Pattern], dtype: torch.dtype) -> chain_ops.Run | None:
        if not self._may_run(dtype):
            return None
        from initperf.kernels.cpu.chain.training import TrainingPlan

        shapes = [(m.out_features, m.in_features) for m in self.layers]
        nnz, indices = [p.nnz for p in patterns], [self._index(m) for m in self.layers]
        plan = TrainingPlan(list(zip(shapes, nnz, indices, self.relus, strict=True)), dtype)
        parameters = [size for n, (N, _) in zip(nnz, shapes, strict=True) for size in ((n, 1), (N,))]
        bits = [m.weight_mask_bits for m in self.layers]
        return chain_ops.Run(plan, shapes, parameters, self.relus, bits, patterns)

    def _inference_plan(self) -> Any:
        dtype = self.layers[0].weight_values.dtype
        if not self._may_run(dtype):
            return None
        found = []
        for layer, relu in zip(self.layers, self.relus, strict=True):
            values, bias = layer.weight_values, layer.bias
            tensors = [values] if bias is None else [values, bias]
            if not all(t.is_cpu and t.dtype == dtype and t.is_contiguous() for t in tensors):
                return None
            if values.numel() != layer._pattern.nnz:
                return None
            if bias is not None and bias.shape != (layer.out_features,):
                return None
            own = None if bias is None else bias.detach()
            found.append((values.detach(), own, layer.weight_mask, self._index(layer)[:3], relu))
        from initperf.kernels.cpu.chain.inference import Plan

        return Plan(found)


def _flat(x: Tensor, plan: Any) -> Tensor:
    """x as (B, inputs); an error where the first layer would raise one."""
    check_input(x, plan.inputs, plan.dtype, True)
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), plan.inputs)
