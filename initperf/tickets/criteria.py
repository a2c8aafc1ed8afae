"""What to prune by, after training: scores of weights, and what their movement says beside a null that knows no training.

Zhou et al. 2019 (Deconstructing Lottery Tickets) compare these criteria; Frankle & Carbin 2019, F.5, the movement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from initperf import prune
from initperf.core.checks import check
from initperf.kernels.reference.precision import in_float64

Score = Callable[[Tensor, Tensor], Tensor]  # (final, initial) -> score; the least are pruned
SCORES: dict[str, Score] = {
    "magnitude": lambda final, initial: final.abs(),
    "movement": lambda final, initial: (final - initial).abs(),
    "magnitude-increase": lambda final, initial: final.abs() - initial.abs(),
    "same-sign": lambda final, initial: (final * initial.sign()).clamp_min(0),
}
CRITERIA = (*SCORES, "random")
NULLS = 4  # permutations averaged


def masks_by(
    criterion: str,
    final: Mapping[str, Tensor],
    initial: Mapping[str, Tensor],
    fraction: prune.Fraction,
    *,
    masks: Mapping[str, Tensor] | None,
    scope: str,
    seed: int,
) -> dict[str, Tensor]:
    """New masks by a criterion of CRITERIA: "magnitude" |w_T|; "movement" |w_T - w_0|; "magnitude-increase" |w_T| - |w_0|;
    "same-sign" |w_T|, or 0 where the sign changed; "random". initial: the values before training, of the same shapes."""
    check(criterion in CRITERIA, f"a criterion of {', '.join(CRITERIA)}", repr(criterion))
    if criterion == "random":
        return prune.random(final, fraction, seed=seed, masks=masks, scope=scope)
    if criterion == "magnitude":
        return prune.magnitude(final, fraction, masks=masks, scope=scope)
    scores = {n: SCORES[criterion](w, initial[n].to(w.device)) for n, w in final.items()}
    return prune.by_score(scores, fraction, masks=masks, scope=scope)


def movement(final: Tensor, initial: Tensor, before: Tensor | None, after: Tensor, *, seed: int) -> dict[str, float]:
    """How far the weights of one layer moved in training, kept against pruned, and under the null.

    before, after: bool masks before and after pruning. moved = mean |w_T - w_0|, grew = mean (|w_T| - |w_0|), flipped =
    share of sign changes. The null permutes w_T - w_0 over the layer's weights and then keeps as many by magnitude:
    selecting by |w_T| alone makes kept weights look moved.
    """
    alive = torch.ones_like(after) if before is None else before.to(after.device)
    start = in_float64(initial.to(final.device)[alive.to(final.device)])
    change = in_float64(final[alive.to(final.device)]) - start
    kept = after[alive].to(start.device)
    found = {
        f"{part}_{name}": v
        for part, who in (("kept", kept), ("pruned", ~kept))
        for name, v in _moves(start, change, who).items()
    }
    generator = torch.Generator("cpu").manual_seed(seed)
    nulls = []
    for _ in range(NULLS):
        other = change[torch.randperm(len(change), generator=generator, device="cpu").to(change.device)]
        chosen = torch.zeros_like(kept)
        chosen[(start + other).abs().topk(int(kept.sum())).indices] = True
        parts = (("kept", chosen), ("pruned", ~chosen))
        nulls.append({f"null_{part}_{name}": v for part, who in parts for name, v in _moves(start, other, who).items()})
    return found | {key: sum(n[key] for n in nulls) / NULLS for key in nulls[0]}


def _moves(start: Tensor, change: Tensor, who: Tensor) -> dict[str, float]:
    if not bool(who.any()):
        return {"moved": 0.0, "grew": 0.0, "flipped": 0.0}
    w, d = start[who], change[who]
    return {
        "moved": float(d.abs().mean()),
        "grew": float(((w + d).abs() - w.abs()).mean()),
        "flipped": float(in_float64((w + d).sign() * w.sign() < 0).mean()),
    }


def overlap(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> dict[str, Any]:
    """Survivors that two masks share, over the survivors of the first, by layer; by chance it is the second's density."""
    return {
        name: {
            "shared": float((mask & others[name]).sum() / mask.sum().clamp_min(1)),
            "chance": float(in_float64(others[name]).mean()),
        }
        for name, mask in masks.items()
    }
