"""What `expect` of describe means for each tensor, and whether the tensor agrees."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from initperf.core.checks import check
from initperf.init import schemes
from initperf.init.identify.fit import facts_of, rejected, without_zeros
from initperf.init.model.plan import plan
from initperf.init.schemes import Init, Place
from initperf.variance.moments import moments

if TYPE_CHECKING:
    from initperf.init.identify.finding import Finding


def expected(model: Any, tensors: Mapping[str, Tensor], expect: Mapping[str, str | Init]) -> dict[str, Init]:
    """The distribution that `expect` means for each tensor that it names."""
    if isinstance(model, nn.Module):
        tasks = plan(model, "keep", expect)
        return {t.name: t.init for t in tasks if t.init is not None}
    wanted = {}
    for name in tensors:
        chosen = [e for pattern, e in expect.items() if fnmatchcase(name, pattern)]
        if not chosen:
            continue
        if isinstance(chosen[-1], Init):
            wanted[name] = chosen[-1].check(name)
            continue
        check(chosen[-1] in schemes.NAMES, f"expect to be one of {', '.join(schemes.NAMES)} or an Init", chosen[-1])
        init = _of_a_file(chosen[-1], name, tensors)
        if init is not None:
            wanted[name] = init
    return wanted


def _of_a_file(scheme: str, name: str, tensors: Mapping[str, Tensor]) -> Init | None:
    """What a scheme means where no module tells the class: matrices are weights of linear layers, vectors named weight those of norms.

    None for what it says nothing about, such as running statistics.
    """
    tensor = tensors[name]
    path, _, leaf = name.rpartition(".")
    if scheme == "keep" or (tensor.dim() == 0 and scheme not in ("zeros", "ones")):
        return None
    weight = tensors.get(f"{name.removesuffix('bias')}weight") if leaf == "bias" else tensor
    by_itself = None
    if leaf in ("weight", "bias") and weight is not None and weight.dim() >= 2:
        by_itself = schemes.fully_connected(weight)[leaf]
    elif leaf.endswith("weight") or (leaf == "bias" and weight is not None):
        by_itself = schemes.constant(leaf != "bias") if tensor.dim() == 1 else None
    init = schemes.named(scheme, Place(name, tensor, nn.Module(), path, leaf, frozenset()), by_itself)
    return by_itself if init is None and tensor.dim() == 1 else init


def disagreement(finding: Finding, tensor: Tensor, init: Init) -> str | None:
    """Why the tensor is not `init`, in words; None if it can be."""
    if init.function == "constant":
        same = finding.low == finding.high == float(torch.tensor(init.args[0], dtype=tensor.dtype, device="cpu"))
        return None if same else f"expected {init}. Found {finding.scheme}, std {finding.std:.4g}"
    if init.function == "orthogonal":
        return None if finding.scheme.startswith("orthogonal") else f"expected {init}. Found {finding.scheme}"
    if finding.low == finding.high:
        return (
            None if finding.std == init.moments(finding.shape)[1] == 0 else f"expected {init}. Found {finding.scheme}"
        )
    dense, _ = without_zeros(tensor, finding.zeros)
    reason = rejected(init, facts_of(dense, moments(dense), tensor.dtype))
    return f"expected {init}: {reason}. Found {finding.scheme}" if reason else None
