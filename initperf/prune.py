"""Masks from weights: magnitude, random and shuffled, layerwise and global, with exact counts.

A mask is a bool tensor, True = survives. `fraction` is of the current survivors: exactly round(fraction * survivors) of
them are pruned, ties by flat index (across tensors: in the dict's order), and what was pruned before never comes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from initperf import rng
from initperf.core import ops
from initperf.core.checks import InitPerfTypeError, check, check_float_tensor, check_mask, check_seed, fail

ops.register("kth_smallest", "masks.select")
ops.register("cut", "masks.select")
ops.register("sample_", "sampling.sample")

Fraction = float | Mapping[str, float]
Masks = dict[str, Tensor]
_EXACT = 2**53  # survivors beyond this are not exact in float64


def magnitude(
    weights: Mapping[str, Tensor],
    fraction: Fraction,
    *,
    masks: Mapping[str, Tensor] | None = None,
    scope: str = "layerwise",
) -> Masks:
    """New masks without the survivors of least |w|.

    weights: float32, bfloat16, float16 or float64, any shape; fraction: one number, or {glob: number}, where the last
    glob that matches a name counts and unmatched tensors keep their mask. scope "layerwise" prunes the fraction of every
    tensor; "global" pools the tensors of one glob. NaN in a survivor raises, and nothing is changed.
    """
    for name, weight in _named(weights).items():
        check_float_tensor(weight, f"weights[{name!r}]")
    return _prune(weights, weights, fraction, masks, scope)


def random(
    weights: Mapping[str, Tensor],
    fraction: Fraction,
    *,
    seed: int,
    masks: Mapping[str, Tensor] | None = None,
    scope: str = "layerwise",
) -> Masks:
    """New masks without random survivors: those first in order of (word(index), index), stream name + "#select" (design: RNG contract)."""
    check_seed(seed)
    words = {name: _words(name, weight, seed) for name, weight in _named(weights).items()}
    return _prune(weights, words, fraction, masks, scope)


def shuffle(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """Every mask with its survivors at random places of the same tensor: layer densities stay exactly as they are."""
    check_seed(seed)
    for name, mask in _named(masks).items():
        check_mask(mask, mask.shape, f"masks[{name!r}]")
    return {name: _smallest([_words(name, m, seed)], None, m.numel() - _count(m))[0] for name, m in masks.items()}


def by_score(
    scores: Mapping[str, Tensor],
    fraction: Fraction,
    *,
    masks: Mapping[str, Tensor] | None = None,
    scope: str = "layerwise",
) -> Masks:
    """New masks without the survivors of least score, signed: for criteria other than the magnitude. Compared as float32."""
    words = {}
    for name, score in _named(scores).items():
        check_float_tensor(score, f"scores[{name!r}]")
        check(not bool(score.isnan().any()), f"scores[{name!r}] without NaN", "NaN")
        bits = score.detach().float().contiguous().view(torch.int32)
        words[name] = torch.where(bits < 0, ~bits, bits ^ -(2**31))  # unsigned order of words = order of floats
    return _prune(scores, words, fraction, masks, scope)


def fractions_by_name(names: list[str], fraction: Fraction) -> dict[str, tuple[str, float]]:
    """name -> (the glob that decides, its fraction); names that no glob matches are left out. A glob that matches nothing raises."""
    given = fraction if isinstance(fraction, Mapping) else {"*": fraction}
    for glob, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            fail(f"the fraction of {glob!r} to be a number", type(value).__name__, kind=InitPerfTypeError)
        check(0 <= value <= 1, f"the fraction of {glob!r} to be at least 0 and at most 1", value)
        check(
            any(fnmatchcase(n, glob) for n in names),
            f"{glob!r} to match one of {', '.join(names) or '(no names)'}",
            "no match",
        )
    return {n: (g, float(f)) for n in names for g, f in given.items() if fnmatchcase(n, g)}


def density(masks: Mapping[str, Tensor]) -> float:
    """Survivors / weights over all masks."""
    return sum(_count(m) for m in masks.values()) / max(sum(m.numel() for m in masks.values()), 1)


def _prune(
    weights: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    fraction: Fraction,
    masks: Mapping[str, Tensor] | None,
    scope: str,
) -> Masks:
    check(scope in ("layerwise", "global"), 'scope "layerwise" or "global"', repr(scope))
    chosen = fractions_by_name(list(weights), fraction)
    masks = {} if masks is None else masks
    unknown = [name for name in masks if name not in weights]
    check(not unknown, f"masks of the weights {', '.join(weights)}", f"masks of {', '.join(unknown)} too")
    for name, mask in masks.items():
        check_mask(mask, weights[name].shape, f"masks[{name!r}]")
    pools: dict[str, list[str]] = {}
    for name, (glob, _) in chosen.items():
        pools.setdefault(name if scope == "layerwise" else glob, []).append(name)
    pruned: Masks = {}
    for pool in pools.values():
        alive = [masks[n] for n in pool] if all(n in masks for n in pool) else None
        if alive is None and any(n in masks for n in pool):
            alive = [masks[n] if n in masks else torch.ones_like(weights[n], dtype=torch.bool) for n in pool]
        survivors = sum(weights[n].numel() for n in pool) if alive is None else sum(_count(m) for m in alive)
        check(survivors < _EXACT, f"fewer than {_EXACT} weights", survivors)
        k = round(chosen[pool[0]][1] * survivors)
        pruned.update(zip(pool, _smallest([keys[n] for n in pool], alive, k), strict=True))
    for name, weight in weights.items():
        if name not in pruned:
            pruned[name] = masks[name].clone() if name in masks else torch.ones_like(weight, dtype=torch.bool)
    return {name: pruned[name] for name in weights}


def _smallest(values: list[Tensor], alive: list[Tensor] | None, k: int) -> list[Tensor]:
    """Masks without the k smallest keys."""
    dtypes = {v.dtype for v in values}
    if len(dtypes) > 1:  # widening is exact and keeps the order
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        values = [v.to(wide) for v in values]
    devices = {v.device for v in values}
    check(len(devices) == 1, "all tensors of one pool on one device", ", ".join(sorted(map(str, devices))))
    values = [v.detach().contiguous() for v in values]
    if alive is not None:
        alive = [a.to(v.device).contiguous() for a, v in zip(alive, values, strict=True)]
    device = values[0].device.type
    selection = ops.implementation("kth_smallest", device)(values, alive, k)
    if int(selection[3]):
        fail("weights without NaN (a diverged training?)", f"NaN in {int(selection[3])} surviving weights")
    return ops.implementation("cut", device)(values, alive, selection)


def _words(name: str, like: Tensor, seed: int) -> Tensor:
    words = torch.empty(like.shape, dtype=torch.int32, device=like.device)
    return ops.implementation("sample_", like.device.type)(words, rng.BITS, (), seed, rng.stream_of(name + "#select"))


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _named(tensors: object) -> dict[str, Tensor]:
    if not isinstance(tensors, Mapping):
        fail("a dict of name -> tensor", type(tensors).__name__, kind=InitPerfTypeError)
    check(len(tensors) > 0, "at least one named tensor", "an empty dict")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            fail("a dict of name -> torch.Tensor", f"{name!r}: {type(tensor).__name__}", kind=InitPerfTypeError)
    return dict(tensors)
