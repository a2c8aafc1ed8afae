"""Criteria other than the magnitude, and the movement of weights against its null."""

import pytest
import torch

from initperf.core.checks import InitPerfError
from initperf.tickets import criteria
from initperf.tickets.criteria import masks_by, movement, overlap

FINAL = torch.tensor([0.5, -2.0, 1.0, -0.1])
INITIAL = torch.tensor([0.6, 1.0, 0.9, -1.5])


@pytest.mark.parametrize(
    ("criterion", "first_pruned"), [("magnitude", 3), ("movement", 0), ("magnitude-increase", 3), ("same-sign", 1)]
)
def test_each_criterion_prunes_its_own_weight_first(criterion, first_pruned):
    masks = masks_by(criterion, {"w": FINAL}, {"w": INITIAL}, 0.25, masks=None, scope="layerwise", seed=0)
    assert masks["w"].tolist() == [i != first_pruned for i in range(4)]


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_every_criterion_prunes_exactly_and_never_revives(criterion):
    g = torch.Generator().manual_seed(0)
    final, initial = (torch.randn(30, 40, generator=g) for _ in range(2))
    before = torch.rand(30, 40, generator=g) < 0.5
    after = masks_by(criterion, {"w": final}, {"w": initial}, 0.3, masks={"w": before}, scope="layerwise", seed=1)["w"]
    assert int(after.sum()) == int(before.sum()) - round(0.3 * int(before.sum()))
    assert not (after & ~before).any()


def test_an_unknown_criterion_is_named():
    with pytest.raises(InitPerfError, match="magnitude, movement"):
        masks_by("size", {"w": FINAL}, {"w": INITIAL}, 0.5, masks=None, scope="layerwise", seed=0)


def test_movement_of_independent_changes_is_what_the_null_says():
    g = torch.Generator().manual_seed(0)
    initial, change = torch.randn(400, 500, generator=g), 0.3 * torch.randn(400, 500, generator=g)
    final = initial + change
    after = masks_by("magnitude", {"w": final}, {"w": initial}, 0.5, masks=None, scope="layerwise", seed=0)["w"]
    found = movement(final, initial, None, after, seed=3)
    for part in ("kept", "pruned"):
        for name in ("moved", "grew", "flipped"):
            assert found[f"{part}_{name}"] == pytest.approx(found[f"null_{part}_{name}"], abs=2e-3)
    assert found["kept_grew"] > 0.02 > -0.02 > found["pruned_grew"]  # selection alone does this


def test_movement_away_from_zero_shows_beyond_the_null():
    g = torch.Generator().manual_seed(0)
    initial = torch.randn(200, 200, generator=g)
    final = initial + 0.3 * initial.sign() * (initial.abs() > 0.7)
    after = masks_by("magnitude", {"w": final}, {"w": initial}, 0.5, masks=None, scope="layerwise", seed=0)["w"]
    found = movement(final, initial, None, after, seed=3)
    assert found["kept_grew"] > found["null_kept_grew"] + 0.05
    assert found["pruned_flipped"] == 0
    assert found["null_pruned_flipped"] > 0


def test_overlap_of_independent_masks_is_chance():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(300, 300, generator=g) < p for p in (0.2, 0.4))
    found = overlap({"w": a}, {"w": b})["w"]
    assert found["chance"] == pytest.approx(0.4, abs=0.01)
    assert found["shared"] == pytest.approx(found["chance"], abs=0.02)
    assert overlap({"w": a}, {"w": a})["w"]["shared"] == 1
