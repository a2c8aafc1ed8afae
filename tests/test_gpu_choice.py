"""Which kernel would run on a GPU: predicted from counts, dense always among the candidates."""

import pytest

from initperf.checks import InitPerfError
from initperf.gpu_choice import BLOCKS, DTYPES, KEYS, NEAREST, OPS, choose, report
from initperf.gpu_counts import COUNTS
from initperf.gpu_devices import DEVICES


@pytest.mark.parametrize("gpu", DEVICES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_is_always_a_candidate_and_the_fastest_comes_first(gpu, op, dtype):
    for rows in (1, 3, 64, 100, 4096):
        for density in (0.0, 0.1, 1.0):
            found = choose(gpu, op, rows, 1000, 777, density, dtype=dtype, block=64, blocks=density)
            assert [c.us for c in found] == sorted(c.us for c in found)
            assert sum(c.kernel == "dense" for c in found) == 1
            assert all(c.us > 0 for c in found)


def test_every_kernel_is_counted_for_every_main_target():
    targets = {NEAREST.get(d.target, d.target) for d in DEVICES.values()}
    assert {t: sorted(set(KEYS) - set(COUNTS.get(t, {}))) for t in targets} == {t: [] for t in targets}


def test_one_row_of_a_large_sparse_weight_decodes():
    best = choose("h100", "forward", 1, 28672, 8192, 0.1)[0]
    assert best.kernel == "decode"
    assert best.bound.startswith("memory")


def test_bfloat16_training_at_half_density_runs_dense():
    assert choose("h100", "forward", 4096, 4096, 4096, 0.5)[0].kernel == "dense"
    assert choose("h100", "dx", 4096, 4096, 4096, 0.5)[0].kernel == "dense"


def test_float32_runs_by_rows_where_it_is_sparse_enough_unless_tf32_is_on():
    assert choose("h100", "forward", 256, 4096, 4096, 0.05, dtype="float32")[0].kernel == "rows"
    assert choose("h100", "forward", 256, 4096, 4096, 0.05, dtype="float32", tf32=True)[0].kernel == "dense"


def test_whole_blocks_run_as_blocks():
    best = choose("h100", "forward", 4096, 4096, 4096, 0.1, block=128, blocks=0.1)[0]
    assert best.kernel == "blocks of 128"


def us(found, kernel):
    return next(c.us for c in found if c.kernel == kernel)


@pytest.mark.parametrize(("op", "kernel"), [("forward", "rows"), ("forward", "decode"), ("dw", "rows at survivors")])
def test_fewer_survivors_never_take_longer(op, kernel):
    times = [us(choose("a100", op, 32, 4096, 4096, d / 20), kernel) for d in range(21)]
    assert times == sorted(times)


def test_dead_tiles_make_the_masked_gradient_faster():
    live = us(choose("h100", "dw", 4096, 4096, 4096, 0.1), "masked tiles")
    assert us(choose("h100", "dw", 4096, 4096, 4096, 0.1, tiles=0.25), "masked tiles") < live / 2


@pytest.mark.parametrize("block", BLOCKS)
def test_fewer_blocks_never_take_longer(block):
    kernel = f"blocks of {block}"
    times = [us(choose("mi300x", "dw", 512, 2048, 2048, 0.5, block=block, blocks=b / 10), kernel) for b in range(11)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": "gtx1080"}, "gpu to be one of a100"),
        ({"op": "backward"}, "op to be one of forward"),
        ({"dtype": "float64"}, "dtype to be one of float32"),
        ({"density": 1.5}, "density between 0 and 1"),
        ({"rows": 0}, "above 0"),
        ({"block": 24}, "block to be one of"),
    ],
)
def test_bad_questions_are_answered_clearly(change, message):
    question = {"gpu": "h100", "op": "forward", "rows": 1, "outputs": 8, "inputs": 8, "density": 0.5} | change
    with pytest.raises(InitPerfError, match=message):
        choose(**question)


@pytest.mark.parametrize("gpu", DEVICES)
def test_the_report_says_that_it_predicts(gpu):
    text = report(gpu, dtype="float32", tf32=True)
    assert "predicted, not measured" in text
    assert DEVICES[gpu].source in text


def test_the_report_refuses_an_unknown_device():
    with pytest.raises(InitPerfError, match="gpu to be one of"):
        report("h1000")
