"""Which kernel would run on a GPU: predicted from counts, dense always among the candidates."""

from types import SimpleNamespace

import pytest
import torch

from initperf import choice
from initperf.cli.gpu_report import live_share, report, whole_blocks
from initperf.core.checks import InitPerfError
from initperf.layers.choice.gpu_counts import COUNTS
from initperf.layers.choice.gpu_devices import DEVICES, device_of
from initperf.layers.choice.gpu_model import BLOCKS, DTYPES, KEYS, LAYER_KERNELS, NEAREST, OPS, choose, kernel_pays


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
def test_the_report_says_that_it_predicts_and_names_a_kernel_with_its_speed_and_its_bound(gpu):
    (table,) = report(gpu, dtype="float32", tf32=True)
    assert "predicted, not measured" in table.title
    assert DEVICES[gpu].source in table.notes[0]
    assert {row[0] for row in table.rows} == set(OPS)
    for row in table.rows:
        found = choose(gpu, row[0], int(row[1]), *map(int, row[2].split(" x ")), 0.5, dtype="float32", tf32=True)
        dense = next(c.us for c in found if c.kernel == "dense")
        assert row[4] == f"{found[0].kernel} {dense / found[0].us:.2f}, {found[0].bound}"


def test_the_report_of_masks_measures_their_tiles_and_finds_their_blocks():
    scattered = torch.zeros(512, 256, dtype=torch.bool)
    scattered[:128, ::7] = True
    blocks = (torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.1).repeat_interleave(64, 0)
    blocks = blocks.repeat_interleave(64, 1)
    (table,) = report("h100", masks={"a.weight": scattered, "b.weight": blocks, "conv": blocks.view(4096, 64, 8, 8)})
    (a, b, conv) = table.rows
    assert a[:4] == ["a.weight", "512 x 256", f"{scattered.float().mean():.1%}", "25%"]
    assert any(cell.startswith("blocks of 64 ") for cell in b[4:])
    assert conv[1:] == b[1:]


def test_tiles_with_a_survivor_are_counted_and_whole_blocks_found():
    mask = torch.zeros(130, 200, dtype=torch.bool)
    mask[129, 199] = True
    assert live_share(mask, 128) == 1 / 4
    assert whole_blocks(mask) is None
    mask = torch.zeros(256, 256, dtype=torch.bool)
    mask[32:64, 96:128] = True
    assert whole_blocks(mask) == 32
    mask[0, 0] = True
    assert whole_blocks(mask) is None
    assert whole_blocks(torch.ones(256, 256, dtype=torch.bool)) is None


@pytest.mark.parametrize(
    ("name", "target", "gpu"),
    [
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA GeForce RTX 4090", "sm_89", "rtx4090"),
        ("AMD Instinct MI300A", "gfx942:sramecc+:xnack-", "mi300x"),
        ("NVIDIA L40S", "sm_89", "rtx4090"),
    ],
)
def test_a_card_is_known_by_its_name_or_stands_for_its_target(name, target, gpu):
    assert device_of(name, target).name == gpu


@pytest.fixture
def h100(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    choice._gpu.cache_clear()
    yield about
    choice._gpu.cache_clear()


def pays(kind, rows, density, dtype=torch.bfloat16, side=4096):
    return choice.sparse_pays(kind, rows, (side, side), round(density * side * side), dtype, "cuda")


def test_layers_on_a_gpu_run_what_is_predicted_to_be_faster(h100):
    assert pays("sparse_linear", 256, 0.05, torch.float32)
    assert not pays("sparse_linear", 4096, 0.5)
    assert not pays("masked_linear", 256, 0.01)
    assert not pays("masked_grad_input", 256, 0.01)
    for kind, (op, kernel, narrow) in LAYER_KERNELS.items():
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            found = choose("h100", op, 64, 4096, 4096, 1.0 if kind.startswith("masked") else 0.1, dtype=name,
                           compressed=kind.startswith("sparse"))  # fmt: skip
            ours = us(found, narrow if dtype == torch.bfloat16 else kernel)
            kept = 32 * 32 if kind.startswith("masked") else round(0.1 * 4096 * 4096)
            assert kernel_pays(DEVICES["h100"], kind, 64, 4096, 4096, kept, name, False) == (ours < us(found, "dense"))


def test_dead_tiles_of_a_masked_layer_bring_its_kernel_in(h100):
    assert choice.sparse_pays("masked_grad_weight", 4096, (4096, 4096), 32 * 32 // 4, torch.bfloat16, "cuda")


def test_a_card_or_a_dtype_of_which_nothing_is_known_runs_the_kernels(h100):
    assert pays("sparse_linear", 4096, 0.9, torch.float64)
    h100.name, h100.major = "NVIDIA Something", 7
    choice._gpu.cache_clear()
    assert pays("sparse_linear", 4096, 0.9)


def test_the_report_refuses_an_unknown_device_or_dtype():
    with pytest.raises(InitPerfError, match="gpu to be one of"):
        report("h1000")
    with pytest.raises(InitPerfError, match="dtype to be one of"):
        report("h100", dtype="float64")
