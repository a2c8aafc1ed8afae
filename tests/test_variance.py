"""Figure 7.4: measured variances against the analytic factors; and the identities of the derivation, by the kernels."""

import csv
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initperf import init, rng
from initperf.checks import InitPerfError
from initperf.experiments.variance import ACTIVATIONS, run_variance
from initperf.stats import moments

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


def test_files_hold_the_table_and_a_picture(tmp_path, figure):
    table, picture = figure.save(tmp_path / "out")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(figure.table()) == 6 * 50
    assert float(rows[101]["forward"]) == figure.table()[101]["forward"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"variance.csv", "variance.png"}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


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


N = 1 << 16
WITHIN = 6 / math.sqrt(N)  # six standard errors of a mean of unit variance

seeds = st.integers(0, 2**32)
numbers = st.floats(-100, 100)


@settings(deadline=None, max_examples=20)
@given(numbers)
def test_the_mean_of_a_constant_is_the_constant(k):
    x = torch.full((1000,), k, dtype=torch.float64)
    assert moments(x).mean == k
    assert moments(x).var == 0


@settings(deadline=None, max_examples=20)
@given(seeds, numbers)
def test_a_factor_leaves_the_mean(seed, k):
    g = normals(N, seed)
    assert math.isclose(moments(k * g).mean, k * moments(g).mean, rel_tol=1e-9, abs_tol=1e-13 * abs(k))


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_the_mean_of_a_sum_is_the_sum_of_means(seed):
    f, g = normals(N, seed), normals(N, seed + 1).exp()
    assert math.isclose(moments(f + g).mean, moments(f).mean + moments(g).mean, rel_tol=1e-12)


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_the_mean_of_a_product_of_independents_is_the_product_of_means(seed):
    f, g = normals(N, seed) + 2, normals(N, seed + 1) - 3
    error = moments(f * g).mean - moments(f).mean * moments(g).mean
    assert abs(error) < WITHIN  # the covariance of two independent unit normals


@settings(deadline=None, max_examples=20)
@given(seeds, st.floats(-5, 5))
def test_the_variance_is_the_mean_square_less_the_squared_mean(seed, shift):
    x = normals(N, seed) + shift
    assert math.isclose(moments(x).var, moments(x * x).mean - moments(x).mean ** 2, rel_tol=1e-11)


@settings(deadline=None, max_examples=10)
@given(seeds)
def test_zero_mean_weights_give_zero_mean_pre_activations_of_variance_s2_sum_of_squares(seed):
    h, s2 = normals(200, seed).relu(), 0.03
    f = normals(N * 4, seed + 1, math.sqrt(s2))[: 1300 * 200].view(1300, 200) @ h
    got, want = moments(f, correction=1), s2 * float((h * h).sum())
    assert abs(got.mean) < 6 * math.sqrt(want / 1300)
    assert got.var == pytest.approx(want, rel=6 * math.sqrt(2 / 1300))


@settings(deadline=None, max_examples=10)
@given(seeds, st.floats(0.1, 10))
def test_the_mean_square_after_relu_is_half_the_variance(seed, std):
    f = normals(N, seed, std)
    assert moments(f.relu()).raw(2) == pytest.approx(std**2 / 2, rel=WITHIN * math.sqrt(5))


@settings(deadline=None, max_examples=5)
@given(seeds)
def test_backward_weights_of_two_by_fan_out_keep_the_variance_of_gradients(seed):
    fan_out, fan_in = 400, 650
    weight = normals(N * 4, seed, math.sqrt(2 / fan_out))[: fan_out * fan_in].view(fan_out, fan_in)
    f, upstream = normals(50 * fan_in, seed + 1).view(50, fan_in), normals(50 * fan_out, seed + 2).view(50, fan_out)
    gradient = (f > 0) * (upstream @ weight)
    assert moments(gradient).var == pytest.approx(1.0, rel=6 * math.sqrt(5 / (50 * fan_out)))
