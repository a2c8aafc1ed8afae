"""Pruning by magnitude: the exact threshold over many tensors, and the masks, against torch's two ways."""

import pytest
import torch

from initperf import prune

SHAPES = {
    "16M in 20 tensors": [(800, 1000)] * 20,
    "LeNet-300-100": [(300, 784), (100, 300), (10, 100)],
}
FRACTION = 0.2


def by_kthvalue(weights):
    sizes = torch.cat([w.abs().flatten() for w in weights])
    threshold = sizes.kthvalue(round(FRACTION * sizes.numel())).values
    return [w.abs() > threshold for w in weights]


def by_topk(weights):
    sizes = torch.cat([w.abs().flatten() for w in weights])
    mask = torch.ones_like(sizes, dtype=torch.bool)
    mask[sizes.topk(round(FRACTION * sizes.numel()), largest=False, sorted=False).indices] = False
    return [m.view_as(w) for m, w in zip(mask.split([w.numel() for w in weights]), weights, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_global_magnitude(versus, shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    weights = {f"w{i}": (torch.randn(s, generator=generator) * 0.02).to(dtype) for i, s in enumerate(SHAPES[shapes])}
    tensors, total = list(weights.values()), sum(w.numel() for w in weights.values())

    def check():
        masks = prune.magnitude(weights, FRACTION, scope="global")
        sizes = torch.cat([w.abs().flatten() for w in tensors])
        kept = torch.cat([m.flatten() for m in masks.values()])
        assert int(kept.sum()) == total - round(FRACTION * total)
        assert sizes[~kept].max() <= sizes[kept].min()

    versus(
        lambda: prune.magnitude(weights, FRACTION, scope="global"),
        {"kthvalue": lambda: by_kthvalue(tensors), "topk": lambda: by_topk(tensors)},
        check=check,
        group=f"prune {shapes}",
        budget=3.0,
        values=total,
        nbytes=sum(w.nbytes for w in tensors),
        dtype=str(dtype),
        fraction=FRACTION,
    )


def test_random_mask(versus):
    """Words by the RNG contract and an exact count, against a random permutation."""
    weight = torch.empty(4096, 4096)

    def theirs():
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[: round(FRACTION * weight.numel())]] = False
        return mask.view_as(weight)

    def check():
        kept = int(prune.random({"w": weight}, FRACTION, seed=1)["w"].sum())
        assert kept == weight.numel() - round(FRACTION * weight.numel())

    versus(
        lambda: prune.random({"w": weight}, FRACTION, seed=1),
        theirs,
        check=check,
        group="prune at random 16M",
        budget=3.0,
        values=weight.numel(),
    )
