"""The side experiments differ from a ticket search in one thing each, resume to the same bits, and write what they found."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors

from initperf.core.checks import InitPerfError
from initperf.experiments.data.sets import digits
from initperf.experiments.recipes import find
from initperf.experiments.side import larger_init, rescaled, scratch, side, unit_pruning, width
from initperf.experiments.side.larger_init import growth, scaled_xavier
from initperf.experiments.side.outcome import by_trial, compare, over_trials, read_rows
from initperf.experiments.side.side import Setting, one_thread, run_experiment
from initperf.experiments.statements import statements
from initperf.init import initialize
from initperf.report.numbers.csv_rows import Point, Row
from initperf.report.numbers.intervals import paired_difference
from initperf.report.numbers.results import Run, read_run
from initperf.ticket import Ticket

TINY = {"iterations": 12, "trials": 2}


def quiet(text):
    pass


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    recipe = find("digits").changed(**TINY, rounds=2)
    return Setting(digits(), recipe, 3, tmp_path_factory.mktemp("side"), quiet)


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Every experiment, once."""
    folder = tmp_path_factory.mktemp("experiments")
    for name in side.EXPERIMENTS:
        run_experiment(name, out=folder / name, **TINY, progress=quiet)
    return folder


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_schedule_leaves_as_many_survivors_whatever_the_width(setting):
    for size in (75, 300, 600):
        rounds, fractions = width.schedule(setting.make((size, size // 3)), 2500, 0.5)
        left = {n: w.numel() for n, w in setting.make((size, size // 3)).named_parameters() if n in fractions}
        for _ in range(rounds):
            left = {n: s - round(fractions[n] * s) for n, s in left.items()}
        assert sum(left.values()) == pytest.approx(2500, abs=2 * rounds)
        assert fractions["fc1.weight"] <= 0.5
        assert fractions["fc3.weight"] == pytest.approx(fractions["fc1.weight"] / 2)
    with pytest.raises(InitPerfError, match="fewer survivors"):
        width.schedule(setting.make((3, 1)), 10**6, 0.5)


def test_the_ways_to_begin_are_those_of_the_search(setting):
    with one_thread():
        setting.search("begin")
    masks = setting.masks("begin", 2)[1]
    ticket = Ticket.load(setting.out / "begin" / "tickets" / "trial1-level2.safetensors")
    model = setting.begin(setting.make(), "ticket", 1, masks)
    for name, weight in ticket.weights().items():
        assert torch.equal(model.get_parameter(name), weight)
    fresh = setting.begin(setting.make(), "reinit", 1, masks)
    shuffled = setting.begin(setting.make(), "shuffle", 1, masks)
    dense = setting.begin(setting.make(), "ticket", 1, None)
    for name, mask in masks.items():
        assert torch.equal(fresh.get_parameter(name) != 0, mask)
        assert not (fresh.get_parameter(name)[mask] == model.get_parameter(name)[mask]).any()
        moved = shuffled.get_parameter(name) != 0
        assert int(moved.sum()) == int(mask.sum())
        assert not torch.equal(moved, mask)
        assert torch.equal(shuffled.get_parameter(name)[moved], dense.get_parameter(name)[moved])


def test_a_dense_networks_variance_is_restored_by_measuring(setting):
    masks = {"fc1.weight": torch.rand(300, 64) < 0.1, "fc2.weight": torch.rand(100, 300) < 0.1}
    whole = rescaled.layer_variances(setting.begin(setting.make(), "ticket", 0, None), setting.sample)
    kept = rescaled.layer_variances(
        setting.begin(setting.make(), "ticket", 0, masks, rescale="measured"), setting.sample
    )
    plain = rescaled.layer_variances(setting.begin(setting.make(), "ticket", 0, masks), setting.sample)
    assert kept["fc2"] == pytest.approx(whole["fc2"], rel=1e-3)
    assert plain["fc2"] < 0.1 * whole["fc2"]
    assert list(whole) == ["fc1", "fc2", "fc3"]


def test_variances_are_over_the_dense_networks(experiments):
    rows = read_rows(experiments / "rescale" / "rescale.csv")
    found = {mode: by_trial(rows, "variance_fc2", start="shuffled", rescale=mode) for mode in rescaled.ALL}
    assert all(value < 0.1 for value in found["none"].values())
    assert all(value == pytest.approx(1, rel=1e-3) for value in found["measured"].values())


def test_scale_1_of_a_larger_init_is_xavier_and_others_are_multiples(setting):
    one, plain, large = setting.make(), setting.make(), setting.make()
    scaled_xavier(1.0)(one, 5)
    initialize(plain, "xavier_normal", seed=5)
    assert torch.equal(parameters(one), parameters(plain))
    scaled_xavier(3.0)(large, 5)
    torch.testing.assert_close(parameters(large), 3 * parameters(plain))


def test_growth_is_that_of_the_mean_magnitude(tmp_path):
    """Against weights trained here by the same loop."""
    recipe = replace(find("digits").changed(**TINY, rounds=1), trials=1)
    mine = Setting(digits(), recipe, 0, tmp_path, quiet)
    trained = {}

    def length(run):
        trained[run.level] = run.model
        return recipe.iterations

    with one_thread():
        run = mine.search("one", iterations=length)
    start = Ticket.load(tmp_path / "one" / "tickets" / "trial0-level0.safetensors").weights()
    for layer, value in growth(run)[0].items():
        final = trained[0].get_parameter(f"{layer}.weight").detach().double()
        expected = final.abs().mean() / start[f"{layer}.weight"].double().abs().mean() - 1
        assert value == pytest.approx(float(expected), abs=1e-6)


def test_scratch_e_is_the_beginning_of_scratch_b(experiments):
    run = read_run(experiments / "scratch" / "lr0.0012")
    rows = read_rows(experiments / "scratch" / "scratch.csv")
    lengths = {(r.level, r.kind): r.iterations for r in run.rows}
    assert {lengths[level, "ticket"] for level in range(4)} == {12}
    assert [lengths[level, "reinit"] for level in (1, 2, 3)] == [math.ceil(12 / run.density(1)), 48, 48]
    at = {"lr": 0.0012, "density": run.density(3)}
    points = [p for p in run.points if (p.trial, p.level, p.kind) == (1, 3, "reinit")]
    for network, until in (("Scratch-E", 12), ("Scratch-B", 48)):
        best = min((p for p in points if p.iteration <= until), key=lambda p: p.val_loss)
        assert by_trial(rows, "early_stop_test_accuracy", **at, network=network)[1] == best.test_accuracy
        last = next(p for p in points if p.iteration == until)
        assert by_trial(rows, "final_test_accuracy", **at, network=network)[1] == last.test_accuracy
    assert over_trials(rows, "compute", **at, network="Scratch-B").mean == 4
    assert scratch.compute(0.5, 4) == 2


def test_scratch_is_read_where_its_validation_loss_was_least_in_its_own_time():
    losses = {10: 0.5, 20: 0.3, 30: 0.4, 40: 0.2, 50: 0.6}
    points = [Point(0, 1, "reinit", at, loss, at / 100) for at, loss in losses.items()]
    row = Row(0, 1, "reinit", 0.1, 50, 40, 0.2, 0.4, 0.5, None, 1.0)
    run = Run(Path("run"), {"iterations": 30}, [row], points, [], {})
    (equal,), (longer,) = (scratch.scratch_rows(run, 1, until) for until in (30, None))
    columns = ("early_stop_iteration", "early_stop_test_accuracy", "final_test_accuracy")
    assert [equal[name] for name in columns] == [20, 0.2, 0.3]
    assert [longer[name] for name in columns] == [40, 0.4, 0.5]
    assert longer["compute"] == pytest.approx(50 / 30)


def test_scratch_e_is_what_a_search_calls_reinit(experiments, tmp_path):
    recipe = find("digits").changed(**TINY)
    with one_thread():
        run = Setting(digits(), recipe, 0, tmp_path, quiet).search("plain", controls=["reinit"])
    rows = read_rows(experiments / "scratch" / "scratch.csv")
    for level in (1, 2, 3):
        found = by_trial(rows, "final_test_accuracy", lr=0.0012, density=run.density(level), network="Scratch-E")
        assert found == run.by_trial(level, "reinit", "final_test_accuracy")


def test_units_of_least_incoming_norm_go_with_their_bias_and_outgoing_weights():
    weight = torch.tensor([[1.0, -1.0], [0.1, 0.1], [-3.0, 0.0], [0.0, 2.0]])
    state = {
        "fc1.weight": weight,
        "fc1.bias": torch.arange(4.0),
        "fc2.weight": torch.arange(12.0).view(3, 4),
        "fc2.bias": torch.arange(3.0),
        "fc3.weight": torch.arange(6.0).view(2, 3),
        "fc3.bias": torch.arange(2.0),
    }
    found = unit_pruning.prune_units(state, (2, 2))
    assert torch.equal(found["fc1.weight"], weight[[0, 2]])  # norms 2, 0.2, 3, 2: of equal ones the first
    assert torch.equal(found["fc1.bias"], torch.tensor([0.0, 2.0]))
    assert torch.equal(found["fc2.weight"], torch.tensor([[4.0, 6.0], [8.0, 10.0]]))
    assert torch.equal(found["fc2.bias"], torch.tensor([1.0, 2.0]))
    assert torch.equal(found["fc3.weight"], torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    assert torch.equal(state["fc1.weight"], weight)


def test_fine_tuning_starts_where_the_large_network_ended(experiments, setting):
    folder = experiments / "structured"
    rows = read_rows(folder / "structured.csv")
    trained = safetensors.load_file(folder / "large" / "trained-trial1.safetensors")
    hidden = tuple(round(0.5 * width) for width in find("digits").hidden)
    small = setting.make(hidden)
    small.load_state_dict(unit_pruning.prune_units(trained, hidden))
    start = Ticket.load(folder / "kept0.5-fine-tuned" / "tickets" / "trial1-level0.safetensors").weights()
    for name, value in start.items():
        assert torch.equal(value, small.get_parameter(name))
    weights = {row["kept"]: row["weights"] for row in rows}
    longer = {r["kept"]: r["compute"] for r in rows if r["network"] == "Scratch-B"}
    assert longer[0.5] == pytest.approx(weights[1.0] / weights[0.5], abs=0.1)
    assert longer[0.1] == 4


@pytest.mark.parametrize("name", side.EXPERIMENTS)
def test_every_experiment_leaves_numbers_a_figure_and_its_recipe(experiments, name):
    rows = read_rows(experiments / name / f"{name}.csv")
    assert {row["trial"] for row in rows} == {0, 1}
    assert all(0 <= row["early_stop_test_accuracy"] <= 1 for row in rows)
    assert (experiments / name / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    about = json.loads((experiments / name / f"{name}.json").read_text())
    assert about["budget"] == "reduced budget"
    assert "CC BY 4.0" in about["attribution"]
    assert {"width": 24, "rescale": 32, "larger-init": 18, "scratch": 40, "structured": 20}[name] == len(rows)


def test_an_interrupted_experiment_goes_on_to_the_same_bits(experiments, tmp_path):
    def stop(text):
        if "scale1.414-reinit" in text:
            raise KeyboardInterrupt

    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        run_experiment("larger-init", out=out, **TINY, progress=stop)
    assert not (out / "larger-init.csv").exists()
    run_experiment("larger-init", out=out, **TINY, progress=quiet)
    for end in ("csv", "svg"):
        name = f"larger-init.{end}"
        assert (out / name).read_bytes() == (experiments / "larger-init" / name).read_bytes()


def test_another_seed_in_the_same_folder_is_refused(experiments, tmp_path):
    shutil.copytree(experiments / "larger-init", tmp_path / "x")
    with pytest.raises(InitPerfError, match="seed"):
        run_experiment("larger-init", out=tmp_path / "x", **TINY, seed=1, progress=quiet)


def test_tables_from_the_csv_file_are_those_that_were_printed(experiments):
    modules = {
        "width": width,
        "rescale": rescaled,
        "larger-init": larger_init,
        "scratch": scratch,
        "structured": unit_pruning,
    }
    for name, module in modules.items():
        outcome, _ = run_experiment(name, out=experiments / name, **TINY, progress=quiet)
        again = module.tables(read_rows(experiments / name / f"{name}.csv"))
        assert [table.rows for table in again] == [table.rows for table in outcome.tables]
        assert all(len(row) == len(table.columns) for table in again for row in table.rows)
        assert "Reduced budget" in outcome.tables[-1].notes[-1]


def test_rows_are_compared_by_trial():
    rows = [
        {"trial": t, "network": n, "x": v} for n, vs in (("a", (1, 2, 4)), ("b", (0, 0, 1))) for t, v in enumerate(vs)
    ]
    found = compare(rows, "x", {"network": "a"}, {"network": "b"})
    assert found == paired_difference([1, 2, 3])
    assert compare(rows[:3] + rows[4:], "x", {"network": "a"}, {"network": "b"}).trials == 2
    assert compare(rows, "x", {"network": "a"}, {"network": "c"}) is None


def test_unknown_experiments_and_data_are_named(tmp_path):
    with pytest.raises(InitPerfError, match="width, rescale, larger-init, scratch, structured"):
        run_experiment("depth", out=tmp_path)
    with pytest.raises(InitPerfError, match="digits or mnist"):
        run_experiment("width", "cifar10", out=tmp_path)


@pytest.fixture(scope="module")
def results(experiments, setting, tmp_path_factory):
    """docs/results of a run and the experiments."""
    with one_thread():
        setting.search("run", controls=["reinit"])
    out = tmp_path_factory.mktemp("docs") / "results"
    assert statements.main([str(setting.out / "run"), "--experiments", str(experiments), "--out", str(out)]) == 0
    return out


def test_the_results_page_has_every_statement_with_a_verdict_and_its_budget(results):
    text = (results / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    verdicts = [line.split("**")[1] for line in rows]
    assert len(verdicts) == 9 + 4 + 6 + 5 + 8
    assert set(verdicts) <= {"reproduced", "not reproduced", "not tested"}
    counts = {v: verdicts.count(v) for v in ("reproduced", "not reproduced", "not tested")}
    assert f"Of {len(verdicts)} statements " in text
    assert all(f"{count} {verdict}" in text for verdict, count in counts.items())
    assert text.count("reduced budget") > 13


def test_the_results_page_links_to_files_that_are_there_and_small(results):
    text = (results / "README.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(links) > 12
    for link in links:
        assert (results / link).is_file()
        assert (results / link).stat().st_size < 300_000
    with (results / "digits" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * (1 + 2 * 2)


def test_results_of_something_else_are_one_line(tmp_path, capsys):
    assert statements.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "Expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
