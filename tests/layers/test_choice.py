"""Sparse or dense: the table, its interpolation, the file it is kept in, and the overrides."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from initperf import MaskedLinear, SparseLinear, choice

MIDDLE = 1 << 18


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A machine of its own: tables are read from an empty folder. Call it to write one."""
    path = tmp_path / "break-even.json"
    monkeypatch.setattr(choice, "table_path", lambda threads: path)
    choice.forget()

    def write(density, narrow=1.0):
        """density(rows, weights) of four bytes; those of two are `narrow` times as large."""
        content = {
            f"{kind}/{size}": [[factor * density(r, w) for w in choice.WEIGHTS] for r in choice.ROWS]
            for kind in choice.KINDS
            for size, factor in ((4, 1.0), (2, narrow))
        }
        path.write_text(json.dumps({"table": content}))
        choice.forget()

    yield write
    choice.forget()


def pays(density, rows=64, kind="masked_linear", dtype=torch.float32, weights=MIDDLE):
    side = round(weights**0.5)
    return choice.sparse_pays(kind, rows, (side, side), round(density * side * side), dtype, "cpu")


def test_the_choice_follows_the_measured_table_and_changes_at_its_break_even(table):
    table(lambda rows, weights: 0.3)
    assert pays(0.29)
    assert not pays(0.31)
    table(lambda rows, weights: 0.1)
    assert not pays(0.29)
    assert pays(0.09)


def test_rows_weights_and_dtype_of_the_call_choose_the_entry(table):
    table(lambda rows, weights: 0.5 if rows >= 64 and weights >= MIDDLE else 0.0)
    assert pays(0.4)
    assert not pays(0.4, rows=1)
    assert not pays(0.4, weights=1 << 10)
    assert pays(0.4, rows=100_000, weights=1 << 28), "beyond the table its last entry counts"
    table(lambda rows, weights: 0.5, narrow=0.5)
    for dtype, limit in ((torch.float32, 0.5), (torch.float64, 0.5), (torch.bfloat16, 0.25), (torch.float16, 0.25)):
        assert pays(limit - 0.01, dtype=dtype)
        assert not pays(limit + 0.01, dtype=dtype)


@given(rows=st.integers(0, 10_000), weights=st.integers(1, 1 << 30))
def test_between_the_entries_the_break_even_lies_between_theirs(rows, weights):
    limit = choice.break_even("masked_linear", rows, weights, 4, 1)
    found = [v for row in choice.tables(1)["masked_linear/4"] for v in row]
    assert min(found) - 1e-9 <= limit <= max(found) + 1e-9


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"table": {}}', '{"table": 3}', '{"table": {"masked_linear/4": [[9]]}}']
)
def test_a_table_that_cannot_be_read_counts_as_none(table, tmp_path, content):
    (tmp_path / "break-even.json").write_text(content)
    assert choice.measured(1) is None
    assert choice.tables(1) is choice.built_in_table()


def test_the_built_in_table_never_chooses_sparse_for_small_masked_layers_or_dense_ones():
    for kind in choice.KINDS:
        for size in (2, 4):
            rows = choice.built_in_table()[f"{kind}/{size}"]
            assert all(limit <= 0.5 for limit in rows[-1])
            if kind.startswith("masked"):
                assert all(limit <= 0.42 for row in rows for limit in row)
                assert all(row[0] == 0 for row in rows)


def test_prefer_overrides_the_table_within_its_block_and_nests(table):
    table(lambda rows, weights: 0.0)
    with choice.prefer("sparse"):
        assert pays(0.9)
        with choice.prefer("dense"):
            assert not pays(0.0001)
        assert pays(0.9)
    assert not pays(0.0001)
    with pytest.raises(ValueError, match="Expected mode to be one of auto, sparse, dense"), choice.prefer("fast"):
        pass


@pytest.mark.parametrize(("value", "expected"), [("dense", "False False"), ("sparse", "True True"), ("", "True False")])
def test_the_environment_overrides_too(value, expected):
    """With a table of its own: those of machines differ."""
    code = (
        "import torch; from initperf import choice; choice.break_even = lambda *_: 0.3; "
        "print(*(choice.sparse_pays('masked_linear', 64, (512, 512), n, torch.float32, 'cpu') for n in (9, 1 << 18)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "INITPERF_PRODUCTS": value}, capture_output=True, text=True
    )
    assert ran.stdout.strip() == expected, ran.stderr


def test_calibration_measures_keeps_and_uses_a_table(table, tmp_path, monkeypatch):
    pytest.importorskip("numba")
    from initperf.layers.choice import calibrate

    monkeypatch.setattr(choice, "ROWS", (4, 64))
    monkeypatch.setattr(choice, "WEIGHTS", (1 << 8, 1 << 12))
    for name in ("ROWS", "WEIGHTS"):
        monkeypatch.setattr(calibrate, name, getattr(choice, name))
    monkeypatch.setattr(calibrate, "DTYPES", {4: torch.float32, 2: torch.float32})
    monkeypatch.setattr(calibrate, "SECONDS", 1e-4)
    found = calibrate.calibrate()
    kept = json.loads((tmp_path / "break-even.json").read_text())
    assert kept["table"] == found
    assert choice.measured(kept["threads"]) == found
    assert all(0 <= v <= choice.MOST for rows in found.values() for row in rows for v in row)


def test_break_even_is_where_a_line_through_two_measured_times_meets_the_dense_time(monkeypatch):
    pytest.importorskip("numba")
    from initperf.layers.choice import calibrate

    class Layer:
        def __init__(self, density):
            self.density, self.mask, self.weight = density, torch.zeros(4, 4), torch.zeros(1)

        def products(self, x):
            return {kind: (lambda: self.density, lambda: None) for kind in choice.KINDS}

    times = {0.1: 3.0, 0.3: 5.0}  # 2 + 10 density
    monkeypatch.setattr(calibrate, "interleaved", lambda calls: [times[calls[0]()], times[calls[1]()], 6.0])
    for kind, density in calibrate._break_evens([Layer(0.1), Layer(0.3)], 4):
        overhead = calibrate.OVERHEAD[kind.split("_")[0]]
        assert density == pytest.approx((6.0 * calibrate.MARGIN - overhead - 2) / 10, rel=1e-12)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_product_of_a_layer_asks_by_the_batchs_rows_and_the_masks_survivors(compressed, monkeypatch):
    pytest.importorskip("numba")
    asked, counts = [], []

    def answer(kind, rows, shape, nnz, dtype, device, **_):
        asked.append((kind, rows, tuple(shape), dtype, device))
        counts.append(nnz)
        return True

    monkeypatch.setattr("initperf.layers.ops.masked_linear.sparse_pays", answer)
    monkeypatch.setattr("initperf.choice.sparse_pays", answer)
    monkeypatch.setattr(choice, "all_dense", lambda *_: False)
    monkeypatch.setattr("initperf.core.without_dispatch.TINY", 0)
    monkeypatch.setattr("initperf.layers.ops.masked_linear.MOST_COMPOSED", 0)
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    layer = (SparseLinear if compressed else MaskedLinear)(20, 30, mask=mask)
    layer(torch.randn(7, 20, requires_grad=True)).sum().backward()
    kinds = choice.KINDS[3:] if compressed else choice.KINDS[:3]
    assert asked == [(kind, 7, (30, 20), torch.float32, "cpu") for kind in kinds]
    survivors = int(mask.sum())
    assert all(survivors <= n <= survivors + 30 for n in counts)  # rows of the index are padded to even lengths
