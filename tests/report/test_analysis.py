"""What a run folder tells beyond accuracy: own learning rates, movement against its null, survivors, overlap of masks."""

import csv
import json
import math
import random

import pytest
import torch
from scipy import stats

from fake_run import write_run
from initperf.experiments.side.side import Setting, one_thread
from initperf.report.numbers import movement, survivors
from initperf.report.numbers.intervals import Difference, paired_difference
from initperf.report.numbers.movement import Gap, growth, movement_gap, movement_of, write_analysis
from initperf.report.numbers.results import read_run
from initperf.report.numbers.survivors import BINS, Overlap, Survivors, examine
from initperf.report.page import write_report
from initperf.report.words.findings import points
from initperf.report.words.movement import (
    evenly,
    explained,
    movement_table,
    overlap_table,
    own_rates_sentence,
    own_rates_table,
    survivors_table,
)
from initperf.ticket import Ticket
from initperf.tickets import criteria
from initperf.tickets.run_folder import MOVEMENT

NAMES = ("moved", "grew", "flipped")
COLUMNS = [f"{null}{part}_{name}" for null in ("", "null_") for part in ("kept", "pruned") for name in NAMES]


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def with_movement(folder, seed=0):
    """Random values, whose meaning does not matter; two layers of 100 and 20 weights, halved every level."""
    noise = random.Random(seed)
    rows = []
    for trial in range(5):
        for level in range(3):
            for parameter, weights in (("fc1.weight", 100), ("fc2.weight", 20)):
                values = {name: noise.uniform(0, 1) for name in COLUMNS}
                about = {"trial": trial, "level": level, "parameter": parameter, "weights": weights}
                rows.append(about | {"survivors": weights >> (level + 1)} | values)
    assert set(rows[0]) == set(MOVEMENT)
    write_rows(folder / "movement.csv", rows)
    return rows


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A real search: two trials, two levels, two layers, of random images."""
    from initperf.experiments.data.data_set import DataSet, Split
    from initperf.experiments.recipes import find

    g = torch.Generator().manual_seed(0)
    split = Split(torch.randn(60, 12, generator=g), torch.randint(0, 3, (60,), generator=g))
    images = DataSet("digits", "", 3, split, split, split, "0")
    recipe = find("digits").changed(iterations=20, trials=3, rounds=2, batch=20)
    setting = Setting(images, recipe, 0, tmp_path_factory.mktemp("search"), lambda text: None)
    with one_thread():
        setting.search("run")
    return setting.out / "run"


def test_movement_counts_every_weight_once_over_the_layers(folder):
    rows = with_movement(folder)
    mine = [row for row in rows if (row["trial"], row["level"]) == (2, 1)]
    found = movement_of(read_run(folder), 1)[2]
    assert (found.kept, found.pruned) == (25 + 5, 25 + 5)  # level 1 began with 50 and 10
    expected = sum(row["kept_moved"] * row["survivors"] for row in mine) / 30
    assert found.measured["kept_moved"] == pytest.approx(expected)
    expected = (mine[0]["null_pruned_grew"] * 25 + mine[1]["null_pruned_grew"] * 5) / 30
    assert found.null["pruned_grew"] == pytest.approx(expected)


def test_the_gap_beyond_the_null_is_paired_by_trial(folder):
    with_movement(folder)
    run = read_run(folder)
    gap = movement_gap(run, 2, "grew")
    moved = movement_of(run, 2).values()
    measured = [m.measured["kept_grew"] - m.measured["pruned_grew"] for m in moved]
    null = [m.null["kept_grew"] - m.null["pruned_grew"] for m in moved]
    expected = stats.ttest_rel(measured, null).confidence_interval(0.95)
    assert (gap.beyond.low, gap.beyond.high) == pytest.approx((expected.low, expected.high))
    assert gap.explained == pytest.approx(sum(null) / sum(measured))
    assert growth(run, 2).mean == pytest.approx(sum(m.measured["kept_grew"] for m in moved) / 5)


def test_what_the_null_explains_is_said_only_where_there_is_something_to_explain():
    def gap(measured, null):
        return Gap(
            Difference(measured, measured - 0.1, measured + 0.1, 3), Difference(null, 0, 0, 3), Difference(0, 0, 0, 3)
        )

    assert [explained(gap(1.0, null)) for null in (0.5, 1.5, -0.5)] == ["50%", "> 100%", "none"]
    assert explained(gap(0.05, 0.05)) == "–"


def test_the_null_permutes_over_the_weights_that_were_alive_and_no_others():
    g = torch.Generator().manual_seed(0)
    initial = torch.randn(100, 100, generator=g)
    before = torch.rand(100, 100, generator=g) < 0.3
    final = (initial + 0.5).masked_fill(
        ~before, 0
    )  # every living weight moves by 0.5; the dead are zero, as masked layers keep them
    after = criteria.masks_by(
        "magnitude", {"w": final}, {"w": initial}, 0.5, masks={"w": before}, scope="layerwise", seed=0
    )["w"]
    found = criteria.movement(final, initial, before, after, seed=1)
    for part in ("kept", "pruned"):
        assert found[f"{part}_moved"] == pytest.approx(0.5)
        assert found[f"null_{part}_moved"] == pytest.approx(0.5)


def test_sign_changes_of_a_run_are_those_of_its_weights(searched):
    run = read_run(searched)
    for level in (0, 1):
        for moved in movement_of(run, level).values():
            assert moved.kept == sum(int(m.sum()) for m in ticket(searched, moved.trial, level + 1).masks.values())
            before = ticket(searched, moved.trial, level).masks
            alive = sum(int(m.sum()) for m in before.values()) if before else 12 * 300 + 300 * 100 + 100 * 3
            assert moved.kept + moved.pruned == alive


def ticket(folder, trial, level):
    return Ticket.load(folder / "tickets" / f"trial{trial}-level{level}.safetensors")


def test_survivors_are_described_by_their_initial_values(searched):
    run = read_run(searched)
    found, _ = examine(run)
    assert {(s.trial, s.level) for s in found} == {(t, level) for t in range(3) for level in range(3)}
    one = next(s for s in found if (s.trial, s.level, s.parameter) == (1, 2, "fc2.weight"))
    mask = ticket(searched, 1, 2).masks["fc2.weight"]
    whole = ticket(searched, 1, 0).weights()["fc2.weight"].double()
    values = whole[mask]
    assert (one.weights, one.survivors) == (30_000, int(mask.sum()))
    assert one.density == int(mask.sum()) / 30_000
    assert one.std == pytest.approx(float(values.std(correction=0)))
    assert one.std_ratio == pytest.approx(float(values.std(correction=0) / whole.std(correction=0)))
    assert one.mean_abs_ratio == pytest.approx(float(values.abs().mean() / whole.abs().mean()))
    assert one.kurtosis == pytest.approx(float(stats.kurtosis(values.numpy(), fisher=False)))
    assert one.positive == pytest.approx(float((values > 0).double().mean()))
    assert sum(one.histogram) == pytest.approx(1)
    scaled = values / whole.std(correction=0)
    inside = float(((scaled > BINS[14]) & (scaled <= BINS[18])).double().mean())
    assert sum(one.histogram[14:18]) == pytest.approx(inside)
    assert one.histogram[-1] == pytest.approx(float((scaled > BINS[-2]).double().mean()))


def test_overlap_with_chance_is_hypergeometric():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(40, 50, generator=g) < p for p in (0.3, 0.2))
    found = survivors._overlap(1, "w", 0, 1, a, b)
    kept = int(a.sum())
    law = stats.hypergeom(2000, int(b.sum()), kept)
    assert found.shared == pytest.approx(int((a & b).sum()) / kept)
    assert (found.chance, found.chance_std) == pytest.approx((law.mean() / kept, law.std() / kept), rel=1e-6)
    assert survivors._overlap(1, "w", 0, 1, a, a).shared == 1


def test_every_pair_of_trials_is_compared_once(searched):
    _, found = examine(read_run(searched))
    pairs = [(o.trial, o.other) for o in found if (o.level, o.parameter) == (1, "fc1.weight")]
    assert pairs == [(0, 1), (0, 2), (1, 2)]
    assert {o.level for o in found} == {1, 2}


def test_the_analysis_is_written_whole_and_in_fractions(folder):
    with_movement(folder)
    run = read_run(folder)
    histogram = [0.0] * (len(BINS) - 1)
    one = Survivors(0, 1, "fc1.weight", 100, 50, 0.5, 0.0, 1.0, 3.0, 1.0, 1.0, 0.5, histogram)
    paths = write_analysis(run, [one], [Overlap(1, "fc1.weight", 0, 1, 0.5, 0.4, 0.01)])
    assert sorted(p.stem for p in paths) == ["initial_histogram", "levels", "movement", "overlap", "survivors"]
    levels = rows_of(folder / "analysis" / "levels.csv")
    assert len(levels) == 1 + 3 * 3
    row = next(r for r in levels if (r["level"], r["kind"]) == ("2", "reinit"))
    spread, lead = (f(2, "reinit", "early_stop_test_accuracy") for f in (run.spread, run.lead))
    column = "early_stop_test_accuracy"
    assert [float(row[f"{column}_{name}"]) for name in ("mean", "min", "max")] == list(spread[:3])
    assert [float(row[f"{column}_lead{end}"]) for end in ("", "_low", "_high")] == list(lead[:3])
    assert 0 < float(row[f"{column}_mean"]) < 1
    assert [float(r["surviving"]) for r in levels[::3]] == pytest.approx([1.0, 0.411, 0.135, 0.042])
    assert len(rows_of(folder / "analysis" / "movement.csv")) == 3 * 3


def test_a_run_without_tickets_or_movement_still_has_its_levels(folder):
    write_report(folder)
    assert [p.name for p in (folder / "analysis").iterdir()] == ["levels.csv"]


def test_a_real_run_shows_all_of_the_analysis(searched):
    text = write_report(searched).read_text()
    for title in ("How weights moved", "What the survivors began with", "Overlap of masks between trials"):
        assert f"<h2>{title}</h2>" in text
    run = read_run(searched)
    found, overlaps = examine(run)
    tables = [movement_table(run), survivors_table(run, found), overlap_table(run, overlaps)]
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert [len(t.rows) for t in tables] == [3 * 2, 3 * 3, 3 * 2]


@pytest.fixture
def rates(folder):
    """The run trained at 0.001 and again at 0.01, where re-initialized networks have less validation loss but no better test accuracy."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lr": 0.001}))
    rows = rows_of(folder / "results.csv")
    slow = [row | {"lr": "0.001"} for row in rows]
    shift = {"reinit": -0.05, "ticket": 0.05, "shuffle": 0.05}
    fast = [
        row
        | {"lr": "0.01", "early_stop_val_loss": str(float(row["early_stop_val_loss"]) + shift[row["kind"]])}
        | {"early_stop_test_accuracy": str(float(row["early_stop_test_accuracy"]) - 0.001)}
        for row in rows
    ]
    write_rows(folder / "results.csv", slow + fast)
    return folder


def test_networks_at_other_learning_rates_are_kept_apart(folder, rates):
    run = read_run(rates)
    assert {row.lr for row in run.rows} == {0.001}
    assert {row.lr for row in run.other_rows} == {0.01}
    assert run.planned == len(run.rows)


def test_own_learning_rates_are_chosen_by_validation_loss_not_by_test_accuracy(rates):
    run = read_run(rates)
    own, chosen = run.own_rates()
    assert {kind: {lr for (_, k), lr in chosen.items() if k == kind} for kind in run.kinds} == {
        "ticket": {0.001},
        "reinit": {0.01},
        "shuffle": {0.001},
    }
    assert len(own.rows) == len(run.rows)
    assert own.lead(2, "reinit").mean == pytest.approx(run.lead(2, "reinit").mean + 0.001)
    assert [row[2] for row in own_rates_table(run).rows][:4] == ["0.001", "0.001", "0.01", "0.001"]
    assert f"re-initialized {points(own.lead(3, 'reinit'))}" in own_rates_sentence(run)[0]
    assert own_rates_sentence(run)[0] in write_report(rates).read_text()
    assert {row["lr"] for row in rows_of(rates / "analysis" / "own_rates.csv")} == {"0.001", "0.01"}


def test_a_diverged_learning_rate_is_nobodys_own(rates):
    rows = rows_of(rates / "results.csv")
    write_rows(
        rates / "results.csv", [row | {"early_stop_val_loss": "nan"} if row["lr"] == "0.01" else row for row in rows]
    )
    assert set(read_run(rates).own_rates()[1].values()) == {0.001}


def test_a_run_without_learning_rates_has_no_table_of_them(folder):
    assert own_rates_table(read_run(folder)) is None
    assert read_run(folder).other_rows == []


def test_a_compressed_step_is_read_where_it_was_timed(folder):
    rows = rows_of(folder / "steps.csv")
    write_rows(folder / "steps.csv", [row | {"sparse_ms": "0.3" if int(row["level"]) > 1 else ""} for row in rows])
    run = read_run(folder)
    assert [step.sparse_ms for step in run.steps] == [None, None, 0.3, 0.3]
    assert run.steps[3].sparse_speedup == pytest.approx(3)
    assert "3.00x" in write_report(folder).read_text()


def test_differences_are_shown_in_points_with_their_interval():
    assert points(Difference(0.0123, 0.01, -0.0146, 3)) == "+1.23 (+1.00 to -1.46)"


def test_the_interval_divides_by_the_trials_minus_one():
    values = [0.0, 1.0, 2.0, 4.0]
    found = paired_difference(values)
    half = stats.t.ppf(0.975, 3) * math.sqrt(sum((v - 1.75) ** 2 for v in values) / 3 / 4)
    assert found.high - found.mean == pytest.approx(half)


def test_evenly_keeps_both_ends():
    assert evenly(list(range(20)), 4) == [0, 6, 13, 19]
    assert evenly([3, 4], 4) == [3, 4]
    assert evenly([], 4) == []
    assert movement.FOLDER == "analysis"
