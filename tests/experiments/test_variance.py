"""Figure 7.4: measured variances against the analytic factors, dense and pruned."""

import csv
import math

import pytest
import torch

from initperf import init, rng
from initperf.core.checks import InitPerfError
from initperf.experiments.variance.masked_weights import MASKS, RESCALES, find_masks, prune_weights, train_briefly
from initperf.experiments.variance.nets import ACTIVATIONS
from initperf.experiments.variance.variance import run_variance, save

SEEDS = 3


def normals(n: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return init.sample_into(torch.empty(n, dtype=torch.float64), rng.normal(0, std), seed=seed, stream=0)


@pytest.fixture(scope="module")
def figure():
    return run_variance(None, seeds=SEEDS, batch=300)


def test_every_layer_multiplies_the_variance_by_its_analytic_factor_both_ways(figure):
    # One layer's factor varies by sqrt(5 / width) among nets, since E f^4 / (E f^2)^2 - 1 is 5 after a ReLU.
    band = 5 * math.sqrt(5 / 100 / (49 * SEEDS))
    wanted = [0.05, 0.5, 1.0, 5.0, 50.0, 1 / 6]
    for row, factor in zip(figure.summary(), wanted, strict=True):
        for way in ("forward", "backward"):
            assert row[f"{way}_factor_expected"] == pytest.approx(factor, rel=1e-9)
            assert row[f"{way}_factor"] == pytest.approx(factor, rel=band)


def test_the_first_layer_multiplies_by_the_number_of_inputs(figure):
    for line, s2 in zip(figure.lines, (0.001, 0.01, 0.02, 0.1, 1.0, 1 / 300), strict=True):
        assert line.forward_expected[0] == pytest.approx(100 * s2, rel=1e-9)
        # 100 units, each a sum of 100 squares: sqrt(2 / 100 / 100 / SEEDS) of it
        assert line.forward[:, 0].mean() == pytest.approx(100 * s2, rel=5 * math.sqrt(2 / 1e4 / SEEDS))


def test_at_unit_variance_the_forward_pass_leaves_float32_and_stays_finite(figure):
    line = figure.lines[4]
    assert line.forward_expected[-1] == pytest.approx(100 * 50.0**49, rel=1e-9)
    assert line.forward[:, -1].min() > 3.5e38
    assert line.forward.isfinite().all()
    assert line.backward.isfinite().all()


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"density": 0.2}, 0.2),
        ({"density": 0.2, "rescale": "layer"}, 1.0),
        ({"density": 0.2, "rescale": "unit"}, 1.0),
        ({"density": 0.2, "mask": "magnitude"}, 0.64981),
        ({"density": 0.2, "mask": "magnitude", "rescale": "layer"}, 3.24905),
        ({"density": 0.2, "mask": "magnitude", "rescale": "squares"}, 1.0),
        ({"density": 0.2, "mask": "magnitude", "rescale": "measured"}, 1.0),
    ],
)
def test_masks_and_rescaling_multiply_by_the_share_of_squares_that_is_left(options, factor):
    result = run_variance(None, depth=12, variances=(0.02,), init=None, seeds=4, batch=300, **options)
    (row,) = result.summary()
    assert row["forward_factor_expected"] == pytest.approx(factor, rel=1e-4)
    # Fewer weights a unit, and masks of unequal fan-in: variance of a factor (5 / width) (1 + 1 / live fan-in)
    assert row["forward_factor"] == pytest.approx(factor, rel=5 * math.sqrt(8 / 100 / (11 * 4)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_wide_layers_follow_the_analytic_variances_of_every_activation(activation):
    result = run_variance(
        None, depth=4, width=600, inputs=300, batch=300, variances=(2 / 600,), init=None, activation=activation, seeds=2
    )
    (line,) = result.lines
    ahead, back = (torch.tensor(v, dtype=torch.float64) for v in (line.forward_expected, line.backward_expected))
    torch.testing.assert_close(line.forward.mean(0), ahead, rtol=0.15, atol=0)
    # The one output scales all gradients of a net alike, so they are compared with those of its last layer.
    torch.testing.assert_close((line.backward / line.backward[:, -1:]).mean(0), back / back[-1], rtol=0.15, atol=0)


@pytest.mark.parametrize("chosen", ["kaiming_normal", "kaiming_uniform", "xavier_normal", "lecun_normal"])
def test_named_initializations_have_the_variances_of_their_papers(chosen):
    result = run_variance(None, depth=12, variances=(), init=chosen, seeds=4, batch=300)
    (row,) = result.summary()
    factor = 0.5 if chosen == "lecun_normal" else 1.0  # 1 / fan-in; the others have the gain sqrt(2) of ReLU
    for way in ("forward", "backward"):
        assert row[f"{way}_factor_expected"] == pytest.approx(factor, rel=1e-9)
        assert row[f"{way}_factor"] == pytest.approx(factor, rel=5 * math.sqrt(5 / 100 / (11 * 4)))


def small(depth: int = 5):
    x = normals(100 * 100, 7).view(100, 100)
    shapes = [(100, 100)] * depth + [(1, 100)]
    return [normals(o * i, 20 + k, math.sqrt(2 / 100)).view(o, i) for k, (o, i) in enumerate(shapes)], x


def test_a_short_training_learns_whatever_the_size_of_the_gradients():
    weights, x = small()
    for size in (1.0, 1e-3):
        start = [w * size for w in weights]
        trained, losses = train_briefly(start, x, torch.relu, seed=0)
        assert min(losses) == losses[-1] or losses[-1] < 0.5 * losses[0]
        assert not torch.equal(trained[0], start[0])
    assert losses[0] == pytest.approx(0.99, abs=1e-6)  # of an output of 0: the target has unit variance, by n - 1


def test_rewound_masks_are_the_largest_after_training_and_leave_the_initial_values():
    weights, x = small()
    trained, _ = train_briefly(weights, x, torch.relu, seed=3)
    masks = find_masks(weights, 0.2, "rewound", seed=3, x=x, activation=torch.relu)
    pruned = prune_weights(weights, masks, None, density=0.2, x=x, activation=torch.relu)
    other = find_masks(weights, 0.2, "magnitude", seed=3, x=x, activation=torch.relu)
    for w, t, m, p in zip(weights, trained, masks, pruned, strict=True):
        assert m.sum() == round(0.2 * w.numel())
        assert t[m].abs().min() >= t[~m].abs().max()
        assert torch.equal(p, w * m)
    assert not all(torch.equal(m, o) for m, o in zip(masks, other, strict=True))


@pytest.fixture(scope="module")
def pruned():
    return run_variance(
        None,
        depth=8,
        variances=(0.02,),
        init=None,
        seeds=3,
        batch=300,
        density=0.2,
        mask=MASKS,
        rescale=(None, *RESCALES),
    )


def test_every_mask_is_measured_with_every_rescaling(pruned):
    assert {(line.mask, line.rescale) for line in pruned.lines} == {(m, r) for m in MASKS for r in (None, *RESCALES)}
    rows = dict(zip([(line.mask, line.rescale) for line in pruned.lines], pruned.summary(), strict=True))
    band = 5 * math.sqrt(8 / 100 / (7 * 3))
    for m in MASKS:
        for r in ("squares", "measured"):
            assert rows[m, r]["forward_factor"] == pytest.approx(1.0, rel=band)
        # sqrt(1 / density) on each layer multiplies the variance by 1 / density
        assert rows[m, "layer"]["forward_factor"] == pytest.approx(5 * rows[m, None]["forward_factor"], rel=1e-9)
    assert rows["random", "layer"]["forward_factor"] == pytest.approx(1.0, rel=band)
    for m in ("magnitude", "rewound"):  # large weights survive, so density says too little of what is left
        assert rows[m, "layer"]["forward_factor"] > 2
        assert rows[m, None]["forward_factor"] == pytest.approx(rows[m, None]["forward_factor_expected"], rel=band)


def test_measured_rescaling_gives_every_layer_the_dense_variance():
    dense = run_variance(None, depth=6, variances=(0.02,), init=None, seeds=2, batch=200)
    for mask in MASKS:
        options = {"density": 0.3, "mask": mask, "rescale": "measured"}
        scaled = run_variance(None, depth=6, variances=(0.02,), init=None, seeds=2, batch=200, **options)
        torch.testing.assert_close(scaled.lines[0].forward, dense.lines[0].forward, rtol=1e-9, atol=0)


def test_several_masks_make_one_picture_and_one_table(tmp_path, pruned):
    table, picture = save(pruned, tmp_path)
    labels = {row["init"] for row in csv.DictReader(table.open())}
    assert len(labels) == len(pruned.lines) == 15
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_files_hold_the_table_and_a_picture(tmp_path, figure):
    table, picture = save(figure, tmp_path / "out")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(figure.table()) == 6 * 50
    assert float(rows[101]["forward"]) == figure.table()[101]["forward"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"variance.csv", "variance.png"}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("options", [{"density": 0.001, "width": 10}, {"width": 1}])
def test_a_network_that_passes_nothing_on_has_a_picture_too(tmp_path, options):
    run_variance(tmp_path, depth=2, batch=10, seeds=2, **options)
    assert (tmp_path / "variance.png").exists()


def test_the_same_seed_gives_the_same_table():
    options = {"depth": 3, "width": 20, "batch": 10, "seeds": 2}
    assert run_variance(None, **options).table() == run_variance(None, **options).table()
    assert run_variance(None, seed=1, **options).table() != run_variance(None, **options).table()


@pytest.mark.parametrize(
    "wrong",
    [
        {"depth": 1},
        {"variances": (0.0,)},
        {"init": "he"},
        {"activation": "sine"},
        {"density": 0.0},
        {"density": 0.5, "mask": "lottery"},
        {"rescale": "more"},
        {"seeds": 0},
        {"variances": (), "init": None},
    ],
)
def test_bad_arguments_write_nothing(tmp_path, wrong):
    with pytest.raises(InitPerfError, match="Expected"):
        run_variance(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
