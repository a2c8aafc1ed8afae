"""The survivors of a weight in the order the kernels read them, kept while the weight stays as it is: inference without looking for them.

Under torch.no_grad or inference_mode a linear layer on the CPU makes this copy at its first call, and drops it when the
kernel tells of a write (write_watch.py). It takes 4 bytes a survivor (8 in float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from initperf.core import ops
from initperf.layers.choice import table as choice
from initperf.layers.inference.write_watch import WriteWatch, watch

if TYPE_CHECKING:
    from initperf.layers.base.pattern import Pattern

LEAST = 1 << 19  # weights; what smaller layers gain does not repay the question whether they were written
REPAID = 100  # calls that together gain what the copy costs, with the protection of pages and the first write to each
TRIES = (
    2  # copies in a row that were written before they were repaid: then there are none until calls without would have
)


class Copy(NamedTuple):
    """What was kept of a weight in a state; no values where that state is not worth it."""

    state: object
    values: Tensor | None
    watch: WriteWatch | None
    generation: int

    def is_of(self, state: object) -> bool:
        """Whether the weight has not been written since; asked of the kernel where there are values."""
        return state == self.state and (self.watch is None or self.watch.generation() == self.generation >= 0)


class Kept:
    """What a layer keeps, and whether it is worth it. For each state of the weight there are values from its first call on, or none."""

    copy: Copy | None = None
    calls = 0  # with it
    failures = 0  # copies in a row that were not repaid

    def renew(
        self, state: object, source: Tensor, more: Sequence[int], shape: tuple[int, int], index: list[Tensor]
    ) -> Copy:
        """Begin with a weight in a new state: `source`, and what follows its address in a source of kernels/cpu/sparse/storage.py."""
        self._account()
        found, generation = None, -1
        if self.failures < TRIES and source.is_contiguous() and not source.is_pinned():
            found = watch(source.data_ptr(), source.nbytes)
            generation = -1 if found is None else found.generation()  # before anything is read
            self.failures += generation < 0
        if found is None or generation < 0:
            made = Copy(state, None, None, 0)
        else:
            from initperf.kernels.cpu.sparse.many_rows import in_order

            values = in_order((source.data_ptr(), *more), shape, source.dtype, index)
            made = Copy(state, values, found, generation)
        self.copy, self.calls = made, 0
        return made

    def drop(self, state: object) -> None:
        """Lift the protection of a weight that was written, so that training writes freely."""
        copy = self.copy
        if copy is not None and state != copy.state:
            self._account()
            self.copy, self.calls = None, 0

    def _account(self) -> None:
        copy = self.copy
        if self.calls >= REPAID:
            self.failures = 0
        elif copy is not None and copy.values is not None:
            self.failures += 1


def state_of(pattern: Pattern, source: Tensor) -> object:
    """What changes with the mask, and with writes that torch counts."""
    version = -1 if source.is_inference() else source._version
    return pattern, version, source.data_ptr(), source.stride(), source.dtype


def linear(
    layer: Any, storage: str, x: Tensor, bias: Tensor | None, pattern: Pattern, source: Tensor, more: Sequence[int]
) -> Tensor | None:
    """x W^T + bias of a plain x (B, K) from the kept survivors of a layer, where no gradient is wanted; None if another product is to run.

    storage: "masked" or "sparse"; source and more: see Kept.renew. The weight obeys the pattern.
    """
    N, K = layer.out_features, layer.in_features
    if (
        N * K < LEAST
        or not pattern.tensors
        or not source.is_cpu
        or not choice.kept_pays(storage, x.shape[0], N * K, pattern.nnz, source.dtype)
        or ops.backend_of(f"{storage}_linear", "cpu") == "reference"
    ):
        return None
    kept: Kept | None = layer._kept
    if kept is None:
        kept = layer.__dict__["_kept"] = Kept()
    state, index, copy = state_of(pattern, source), pattern.tensors[:2], kept.copy
    if copy is None or not copy.is_of(state):
        copy = kept.renew(state, source, more, (N, K), index)
    kept.calls += 1
    if copy.values is None:
        return None
    from initperf.kernels.cpu.sparse.many_rows import multiply

    ops.CALLS[f"{storage}_linear", "numba-kept"] += 1
    return multiply(x, (copy.values.data_ptr(),), N, bias, *index)
