"""What a mask means to a kernel, built once per mask: indices on the CPU, bits and live tiles on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor

from initperf.core import ops, without_dispatch
from initperf.core.bits import pack_bits, unpack_bits
from initperf.core.checks import InitPerfRuntimeError, fail
from initperf.core.torch_private import hook
from initperf.layers.choice.table import MOST

_CALLS = ops.CALLS
ops.register("zero_pruned", "masks.zero_pruned")
ops.register("pattern_tensors", "sparse.index")
ops.register("sparse_tensors", "linear.sparse_linear")


# Which product a layer's last input took; its shape and dtype, the bias's shape, and the setting of initperf.layers.choice.table.
Way = tuple[Callable[..., Tensor], torch.Size, torch.dtype, torch.Size | None, tuple[object, ...]]


class Pattern:
    """tensors: the op argument `pattern`, empty where only dense products run; nnz: survivors; density: nnz / weights."""

    tensors: list[Tensor]
    nnz: int
    density: float
    mask: Tensor  # of a dense weight
    way: Way | None = None
    masked: tuple[str, str] = ("masked_grad_weight", "mkl")  # what is counted where torch's own gradient is masked

    def __init__(self, source: Tensor, content: Tensor) -> None:
        self._source, self._version, self._content = source, version_of(source), content

    def _index(self, op: str, mask: Tensor) -> None:
        self.nnz = 0 if mask.is_meta else int(torch.count_nonzero(mask))
        self.density = self.nnz / mask.numel() if mask.numel() else 1.0
        device = mask.device.type
        indexed = self.nnz and (device != "cpu" or self.density < MOST)
        self.tensors = ops.implementation(op, device)(mask) if indexed else []

    def is_of(self, source: Tensor) -> bool:
        """Whether `source` is the tensor this was built from, and still holds the same.

        Its version tells (inference tensors have none); one that was written, as DistributedDataParallel does before every
        forward, is compared.
        """
        if source is not self._source:
            return False
        if (seen := self._version) >= 0 and source._version == seen:  # the usual case, sooner told
            return True
        version = version_of(source)
        if version != self._version and not source.is_meta and torch.equal(self._packed(source), self._content):
            self._version = version
        return version == self._version

    def _packed(self, source: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def is_broken_by(self, weight: Tensor) -> bool:
        """Whether a weight on the CPU holds anything but 0 where the mask is False."""
        if _kernel() is not None and weight.is_contiguous():
            from initperf.kernels.cpu.masks.zero_pruned import any_pruned

            return any_pruned(weight, self._content)
        return bool((weight != 0).logical_and_(~self.mask).any())

    def unchanged_mask(self) -> Tensor:
        """The mask of a dense weight, for a backward pass: as it was in the forward pass, or an error."""
        mask = self.mask
        if mask is not self._source or not self.is_of(mask):
            fail(
                "the mask of the forward pass in its backward pass",
                "one that was changed in between",
                kind=InitPerfRuntimeError,
            )
        return mask

    def premasked(self, weight: Tensor) -> Tensor:
        """A weight that obeys its mask, for torch's own differentiable op: its gradient gets 0 where pruned. On the CPU.

        By a hook on a view, which takes 6 us where an autograd.Function takes 17.
        """
        if not weight.requires_grad:
            return weight
        view = weight.view_as(weight)
        hook(view, OrderedDict({0: self._mask_gradient}))
        return view

    _transposed: tuple[int, int]

    def premasked_transpose(self, weight: Tensor) -> Tensor:
        """The same for the transpose (K, N) of a weight (N, K), which torch's own nn.Linear makes too: it takes 3 us less."""
        view = weight.t()
        if view.requires_grad:
            hook(view, {0: self._mask_transpose})
        return view

    def _mask_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of the weight, fresh from a product on the CPU: masked in place (None), or under create_graph by a differentiable op."""
        if gradient is None:  # a later Function gave none
            return None
        kernel = self._kernel_for(gradient)
        if kernel is None or not gradient.is_contiguous():
            return torch.where(self.mask, gradient, 0)
        kernel(gradient, self.mask, self._content)
        return None

    def _mask_transpose(self, gradient: Tensor | None) -> Tensor | None:
        """The same for the gradient of the transpose."""
        if gradient is None:
            return None
        kernel = self._kernel_for(gradient)
        if kernel is None or gradient.stride() != self._transposed:
            return torch.where(self.mask.t(), gradient, 0)
        kernel(gradient, self.mask, self._content)
        return None

    def _kernel_for(self, gradient: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """What masks it in place; None if nothing may."""
        mask, version = self.mask, self._version
        if mask is not self._source or (version >= 0 and mask._version != version):
            self.unchanged_mask()  # or an error
        _CALLS[self.masked] += 1
        return _kernel() if without_dispatch.writable(gradient) else None

    @property
    def nbytes(self) -> int:
        """Memory of the indices, and of the copy of the mask that is_of compares."""
        places = self.__dict__.get("places")
        return sum(t.nbytes for t in (*self.tensors, self._content)) + (0 if places is None else places.nbytes)


class SparsePattern(Pattern):
    """Built from a bool mask (N, K); of more dimensions, (N, ...), it is read as (N, the product of the others)."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask, pack_bits(mask))
        self.mask = mask
        rows = mask.flatten(1)
        self._transposed = 1, rows.shape[1]  # strides of the transpose of a contiguous gradient
        self._index("pattern_tensors", rows)

    def _packed(self, source: Tensor) -> Tensor:
        return pack_bits(source)


class CompressedPattern(Pattern):
    """Built from the packed bits of a mask of `shape`, read as (N, K) likewise; for layers with compressed weights."""

    def __init__(self, bits: Tensor, shape: Sequence[int]) -> None:
        super().__init__(bits, bits.clone())
        self._shape = shape
        self._index("sparse_tensors", unpack_bits(bits, shape).flatten(1))

    def _packed(self, source: Tensor) -> Tensor:
        return source

    @cached_property
    def places(self) -> Tensor:
        """Positions of the survivors in the flat weight, int64, made when first asked for: small layers' alone are."""
        return unpack_bits(self._content, self._shape).flatten().nonzero().flatten()


@cache
def _kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """What masks a gradient in place, if Numba is there."""
    if ops.backend_of("zero_pruned", "cpu") == "reference":
        return None
    from initperf.kernels.cpu.masks.zero_pruned import zero_pruned

    return zero_pruned


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written, as torch counts it; -1 for inference tensors, which do not count."""
    return -1 if tensor.is_inference() else tensor._version
