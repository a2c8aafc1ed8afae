"""Every verdict on a statement follows from the numbers, and can come out either way."""

import math
from pathlib import Path

import pytest

from initperf.experiments.statements.claims import (
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    accuracy_statement,
    all_of,
    decide,
    level_at,
    sooner,
)
from initperf.experiments.statements.side import rethinking, review
from initperf.experiments.statements.tickets import convolutional, lenet, movement
from initperf.report.numbers.csv_rows import Moved, Row
from initperf.report.numbers.intervals import Difference, paired_difference
from initperf.report.numbers.results import Run

DENSITIES = [round(0.8**level, 4) for level in range(17)]
LEVEL = {0.513: 3, 0.211: 7, 0.135: 9, 0.036: 15, 0.029: 16}
TRIALS = 5
WOBBLE = (-2, 1, 0, 2, -1)  # of the trials, so that intervals have a width


def accuracy_of(level, kind):
    if level == 0:
        return 0.970
    if kind == "reinit":
        return 0.969 if level < LEVEL[0.211] else 0.960
    return {LEVEL[0.036]: 0.9702, LEVEL[0.029]: 0.9600}.get(level, 0.976 if level == LEVEL[0.135] else 0.974)


def stop_of(level, kind):
    return 800 if level == 0 else 400 if kind == "ticket" else 1100


def make_run(change=None, trials=TRIALS, iterations=2000, **config):
    """A run in which the paper is right in every respect; `change(row)` gives another row."""
    rows = []
    for trial in range(trials):
        for level, density in enumerate(DENSITIES):
            for kind in ("ticket", "reinit") if level else ("ticket",):
                wobble = WOBBLE[(trial + 2 * level + (kind == "reinit")) % TRIALS]
                accuracy = accuracy_of(level, kind) + 1e-4 * wobble
                stop = stop_of(level, kind) + 10 * wobble
                row = Row(trial, level, kind, density, iterations, stop, 0.1, accuracy, accuracy, stop, 1.0)
                rows.append(change(row) if change else row)
    return Run(Path("run"), {"recipe": "lenet-paper", **config}, rows, [], [], {})


def at(density, kind, **values):
    """A change of the rows of one level and kind (0: dense): the given fields take the value, plus the trial's wobble."""

    def change(row):
        if (row.level, row.kind) != (LEVEL.get(density, 0), kind):
            return row
        wobble = WOBBLE[row.trial]
        scale = {"early_stop_iteration": 10, "early_stop_test_accuracy": 1e-4}
        return row._replace(**{name: value + scale.get(name, 0) * wobble for name, value in values.items()})

    return change


def verdicts(statements):
    return {s.text: s.verdict for s in statements}


def test_a_run_in_which_the_paper_is_right_reproduces_every_statement():
    assert set(verdicts(lenet(make_run())).values()) == {REPRODUCED}


@pytest.mark.parametrize(
    ("statement", "change"),
    [
        ("learns faster", at(0.513, "ticket", early_stop_iteration=800)),
        ("more accurate at early stop than the dense", at(0.513, "ticket", early_stop_test_accuracy=0.9700)),
        ("38% earlier", at(0.211, "ticket", early_stop_iteration=700)),  # earlier for sure, but by 12%
        ("2.51x", at(0.211, "reinit", early_stop_iteration=600)),  # 1.5x
        ("0.5 points less", at(0.211, "reinit", early_stop_test_accuracy=0.9722)),  # less for sure, but by 0.18
        ("13.5%", at(0.135, "ticket", early_stop_test_accuracy=0.9712)),
        ("At 3.6%", at(0.036, "ticket", early_stop_test_accuracy=0.9640)),
        ("Re-initialized networks", at(0.135, "reinit", early_stop_test_accuracy=0.9705)),
        ("only from 2.9% on", at(0.029, "ticket", early_stop_test_accuracy=0.9705)),
        ("only from 2.9% on", at(0.135, "ticket", early_stop_test_accuracy=0.9600)),
    ],
)
def test_each_statement_fails_where_its_own_numbers_do(statement, change):
    found = [s for s in lenet(make_run(change)) if statement in s.text]
    assert [s.verdict for s in found] == [NOT_REPRODUCED]


def test_an_effect_in_the_papers_direction_whose_interval_holds_zero_is_not_reproduced():
    def noisy(row):
        return row._replace(early_stop_test_accuracy=row.early_stop_test_accuracy + 0.02 * (row.trial == 1) * row.level)

    assert "not reproduced" in verdicts(lenet(make_run(noisy))).values()


def test_one_trial_tests_nothing():
    assert set(verdicts(lenet(make_run(trials=1))).values()) == {NOT_TESTED}


def test_a_level_that_the_run_has_not_is_not_tested():
    short = make_run()
    short.rows[:] = [row for row in short.rows if row.level < 10]
    found = verdicts(lenet(short))
    assert [text for text, verdict in found.items() if verdict == NOT_TESTED] == [
        "At 3.6% the ticket is still as accurate as the dense network",
        "Tickets are less accurate than dense only from 2.9% on",
    ]
    assert level_at(short, 0.211) == 7
    assert level_at(short, 0.036) is None


def test_the_budget_stands_beside_every_statement():
    assert {s.budget for s in lenet(make_run(budget="reduced budget"))} == {"reduced budget"}
    assert {s.budget for s in lenet(make_run())} == {""}


def test_differences_are_paired_by_trial():
    def change(row):  # trials differ by points, ticket and dense within a trial by hundredths
        return row._replace(early_stop_test_accuracy=row.early_stop_test_accuracy - 0.03 * row.trial)

    assert verdicts(lenet(make_run(change))) == verdicts(lenet(make_run()))


def test_by_early_stop_where_nothing_is_cut_off():
    found = sooner(make_run(), (7, "ticket"), (0, "ticket"))
    assert found.measure == "early stop"
    assert found.times == pytest.approx(2, rel=0.01)
    assert found.share == pytest.approx(0.5, rel=0.01)
    assert found.saved.mean == pytest.approx(400, rel=0.02)


def cut_off(reached):
    """Every network improves to the end; reached: (level, kind) -> iterations to dense's best of the trials, None for never."""

    def change(row):
        there = reached.get((row.level, row.kind))
        value = row.iterations_to_dense_best if there is None else there[row.trial]
        return row._replace(early_stop_iteration=row.iterations, iterations_to_dense_best=value)

    return make_run(change)


def test_a_cut_off_early_stop_is_replaced_by_the_iterations_to_denses_best():
    run = cut_off({(7, "ticket"): [500, 510, 490, 520, 480], (0, "ticket"): [2000] * 5})
    found = sooner(run, (7, "ticket"), (0, "ticket"))
    assert "dense network's best" in found.measure
    assert found.times == pytest.approx(4)


def test_a_control_that_never_gets_there_counts_as_there_at_the_end():
    run = cut_off({(7, "ticket"): [500, 510, 490, 520, 480], (7, "reinit"): [None, 1800, None, None, None]})
    found = sooner(run, (7, "ticket"), (7, "reinit"))
    assert found.times == pytest.approx((4 * 2000 + 1800) / 5 / 500)
    assert found.never == 0


def test_a_ticket_that_never_gets_there_in_one_trial_is_no_earlier():
    run = cut_off({(7, "ticket"): [100, 100, 100, None, 100]})
    assert sooner(run, (7, "ticket"), (0, "ticket")).never == 1
    statement = next(s for s in lenet(run) if "38%" in s.text)
    assert statement.verdict == NOT_REPRODUCED
    assert "1 trial never got there" in statement.measured


def test_the_rule_needs_the_side_the_interval_and_half_the_size():
    assert decide(Difference(0.02, 0.01, 0.03, 5), 0.03) == REPRODUCED
    assert decide(Difference(0.02, -0.01, 0.05, 5), 0.03) == NOT_REPRODUCED
    assert decide(Difference(0.02, 0.01, 0.03, 5), 0.05) == NOT_REPRODUCED
    assert decide(Difference(-0.02, -0.03, -0.01, 5), 0.03) == NOT_REPRODUCED
    assert decide(Difference(-0.02, -0.03, -0.01, 5), -0.03) == REPRODUCED
    assert decide(Difference(0.02, math.nan, math.nan, 1), 0.03) == NOT_TESTED
    assert (
        accuracy_statement("", "", paired_difference([1.0e-5, 1.2e-5, 1.0e-5]), 1, figure=False).verdict == REPRODUCED
    )
    assert all_of([]) == NOT_TESTED
    assert all_of([REPRODUCED, NOT_TESTED]) == NOT_TESTED


def test_convolutional_statements_go_by_the_recipe_that_was_run():
    def better(row):
        gain = 0.04 if row.level == 14 and row.kind == "ticket" else 0
        stop = 200 if row.level == 11 and row.kind == "ticket" else row.early_stop_iteration
        return row._replace(early_stop_test_accuracy=row.early_stop_test_accuracy + gain, early_stop_iteration=stop)

    found = convolutional({"conv2": make_run(better, recipe="conv2")})
    assert [s.verdict for s in found] == [REPRODUCED, REPRODUCED, *[NOT_TESTED] * 4]
    found = convolutional({"conv2": make_run(recipe="conv2")})
    assert [s.verdict for s in found][:2] == [NOT_REPRODUCED, NOT_REPRODUCED]  # 2x: less than half of 3.5 - 1 more


def moved_run(kept, pruned, null_kept, null_pruned, trials=5, grew=0.01):
    """moved of both sides, measured and under the null, at one level."""
    rows = []
    for trial in range(trials):
        noise = 1e-3 * WOBBLE[trial]
        names = ("moved", "grew", "flipped")
        measured = dict(zip([f"kept_{n}" for n in names], (kept + noise, grew + noise, 0.0), strict=True))
        measured |= dict(zip([f"pruned_{n}" for n in names], (pruned, 0.0, 0.0), strict=True))
        null = {f"{part}_{n}": 0.0 for part in ("kept", "pruned") for n in names}
        null |= {"kept_moved": null_kept, "pruned_moved": null_pruned}
        rows.append(Moved(trial, 0, "fc1.weight", 80, 20, measured, null))
    run = make_run(trials=trials)
    run.movement.extend(rows)
    return run


@pytest.mark.parametrize(
    ("values", "grew", "expected"),
    [
        ((0.3, 0.2, 0.20, 0.2), 0.1, [REPRODUCED, REPRODUCED, REPRODUCED, NOT_REPRODUCED]),
        ((0.3, 0.2, 0.29, 0.2), 0.1, [REPRODUCED, REPRODUCED, REPRODUCED, REPRODUCED]),
        ((0.3, 0.2, 0.30, 0.2), -0.1, [REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED, REPRODUCED]),
        ((0.2, 0.3, 0.20, 0.3), 0.1, [NOT_REPRODUCED, REPRODUCED, NOT_REPRODUCED, NOT_REPRODUCED]),
    ],
)
def test_movement_is_judged_with_and_without_the_null(values, grew, expected):
    assert [s.verdict for s in movement(moved_run(*values, grew=grew))] == expected


def test_movement_without_records_or_with_one_trial_is_not_tested():
    assert {s.verdict for s in movement(make_run())} == {NOT_TESTED}
    assert {s.verdict for s in movement(moved_run(0.3, 0.2, 0.2, 0.2, trials=1))} == {NOT_TESTED}


def rows_of(cells, **values):
    """A row for every combination (dict of cells) and trial, with its value plus the trial's wobble."""
    return [
        {"trial": trial, **values, **about, "early_stop_test_accuracy": value + 1e-3 * WOBBLE[(trial + i) % TRIALS]}
        for i, (about, value) in enumerate(cells)
        for trial in range(TRIALS)
    ]


def scratch_rows(small, large):
    """dense, ticket, Scratch-E, Scratch-B at learning rates 0.001 and 0.005."""
    networks = ("dense", "ticket", "Scratch-E", "Scratch-B")
    return rows_of(
        [
            ({"lr": lr, "network": network, "density": 1.0 if network == "dense" else 0.1}, value)
            for lr, values in ((0.001, small), (0.005, large))
            for network, value in zip(networks, values, strict=True)
        ]
    )


def test_training_from_scratch_is_judged_at_both_learning_rates():
    as_liu = scratch_rows((0.95, 0.96, 0.90, 0.95), (0.97, 0.96, 0.96, 0.96))
    assert [s.verdict for s in rethinking({"scratch": as_liu}, {})] == [*[REPRODUCED] * 4, NOT_TESTED]
    otherwise = scratch_rows((0.97, 0.90, 0.90, 0.90), (0.95, 0.96, 0.90, 0.90))
    assert [s.verdict for s in rethinking({"scratch": otherwise}, {})] == [*[NOT_REPRODUCED] * 4, NOT_TESTED]
    assert {s.verdict for s in rethinking({}, {})} == {NOT_TESTED}


def structured_rows(*values):
    """By share of units: fine-tuned, Scratch-E, Scratch-B."""
    networks = ("fine-tuned", "Scratch-E", "Scratch-B")
    return rows_of(
        [
            ({"kept": share, "network": network}, value)
            for share, accuracies in zip((0.5, 0.1), values, strict=True)
            for network, value in zip(networks, accuracies, strict=True)
        ]
    )


def test_structured_pruning_is_judged_at_every_share_of_units_and_for_equal_compute():
    cases = [
        ((0.9, 0.5, 0.9), (0.8, 0.5, 0.81), REPRODUCED),
        ((0.9, 0.9, 0.9), (0.8, 0.8, 0.79), NOT_REPRODUCED),
        ((0.9, 0.9, 0.88), (0.8, 0.8, 0.81), NOT_REPRODUCED),
    ]
    for *values, verdict in cases:
        found = rethinking({"structured": structured_rows(*values)}, {"structured": "digits"})[-1]
        assert (found.verdict, found.budget) == (verdict, "digits")
        assert "50% of the units" in found.measured


def rescale_rows(shuffled, rewound, gain):
    starts = {"rewound": rewound, "re-initialized": 1.0, "shuffled": shuffled}
    return [
        row | {"variance_fc1": variance if row["rescale"] == "layer" else 0.1}
        for start, variance in starts.items()
        for row in rows_of(
            [
                ({"start": start, "rescale": mode}, 0.9 + (gain if mode == "measured" else 0))
                for mode in ("none", "layer", "unit", "squares", "measured")
            ]
        )
    ]


def test_the_reviews_questions_are_judged_from_the_experiments():
    scales = rows_of(
        [
            ({"scale": scale, "network": network}, value)
            for scale, values in ((1.0, (0.97, 0.95)), (1.414, (0.96, 0.97)), (3.162, (0.93, 0.9)))
            for network, value in zip(("dense", "ticket"), values, strict=True)
        ]
    )
    grown = [row | {"growth_fc1": 0.3 / row["scale"] + 1e-3 * row["early_stop_test_accuracy"]} for row in scales]
    widths = rows_of([({"width": w, "network": n}, 0.8 + w / 10_000) for w in (75, 600) for n in ("ticket", "reinit")])
    found = review({"rescale": rescale_rows(1.2, 20.0, 0.02), "larger-init": grown, "width": widths}, {})
    assert {s.verdict for s in found} == {REPRODUCED}

    level = rows_of([({"scale": s, "network": n}, 0.95) for s in (1.0, 1.414, 3.162) for n in ("dense", "ticket")])
    level = [row | {"growth_fc1": 0.3 + 0.1 * row["scale"]} for row in level]
    narrow = rows_of([({"width": w, "network": n}, 0.9) for w in (75, 600) for n in ("ticket", "reinit")])
    found = review({"rescale": rescale_rows(3.0, 1.1, 0.0), "larger-init": level, "width": narrow}, {})
    assert {s.verdict for s in found} == {NOT_REPRODUCED}
    assert {s.verdict for s in review({}, {})} == {NOT_TESTED}
