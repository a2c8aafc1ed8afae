"""The built-in LeNet experiment: recipes as published, a whole run folder, the same bits however it is run."""

import csv
import json

import pytest
import torch

from initperf.checks import InitPerfError
from initperf.experiments import tickets
from initperf.experiments.networks import mlp
from initperf.experiments.tickets import run_ticket
from initperf.results import read_run

TINY = {"rounds": 2, "iterations": 8, "trials": 2}


def rows(folder, table="results.csv"):
    with open(folder / table, newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    events = []
    folder = run_ticket(out=tmp_path_factory.mktemp("runs") / "digits", **TINY, workers=1, progress=events.append)
    return folder, events


def test_a_run_folder_is_whole_and_reads_back(finished):
    folder, _ = finished
    run = read_run(folder)
    assert len(run.rows) == 2 * (1 + 2 * 3)
    assert run.kinds == ["ticket", "reinit", "shuffle"]
    assert [s.level for s in run.steps] == [0, 1, 2]
    assert all(s.dense_ms > 0 and s.masked_ms > 0 for s in run.steps)
    assert [round(s.density, 3) for s in run.steps] == [1.0, 0.355, 0.127]
    assert sorted(p.name for p in (folder / "tickets").iterdir()) == [
        f"trial{t}-level{i}.safetensors" for t in (0, 1) for i in range(3)
    ]
    assert all(0 <= row.final_test_accuracy <= 1 for row in run.rows)
    assert [p.name for p in folder.rglob("*.lock")] == ["tables.lock"]


def test_config_tells_everything_that_determines_the_run(finished):
    config = json.loads((finished[0] / "config.json").read_text())
    expected = {"recipe": "digits", "iterations": 8, "rounds": 2, "trials": 2, "seed": 0, "budget": "reduced budget"}
    assert expected.items() <= config.items()
    assert config["threads"] == 1
    assert "CC BY 4.0" in config["attribution"]
    assert config["versions"]["torch"] == torch.__version__


def test_every_op_ran_on_a_compiled_kernel(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert {"sample_", "kth_smallest", "cut"} <= summary["ops"].keys()
    assert any("sparse" in op for op in summary["ops"])  # 35% survive the first round already
    assert all("reference" not in backends for backends in summary["ops"].values())
    assert summary["ops"]["sparse_linear"].keys() <= {"numba", "mkl"}, (
        "the sparse kernel, or the dense product by choice"
    )


def test_sizes_are_those_of_the_files(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ticket_bytes"]["2"] == (folder / "tickets" / "trial0-level2.safetensors").stat().st_size
    assert summary["dense_checkpoint_bytes"]["2"] > 25 * summary["ticket_bytes"]["2"]


def test_progress_counts_every_network_once(finished):
    _, events = finished
    kinds = [e["event"] for e in events]
    assert (kinds[0], kinds[-1]) == ("start", "end")
    done = [e["done"] for e in events if e["event"] == "network"]
    assert done == list(range(1, 15))
    assert kinds.index("measure") > max(i for i, k in enumerate(kinds) if k == "network")
    assert all(
        {"trial", "level", "kind", "density", "iteration", "iterations"} <= e.keys()
        for e in events
        if e["event"] == "step"
    )


def test_a_finished_run_is_left_as_it_is(finished):
    folder, _ = finished
    before = (folder / "results.csv").read_bytes(), (folder / "steps.csv").read_bytes()
    events = []
    run_ticket(out=folder, **TINY, progress=events.append)
    assert ((folder / "results.csv").read_bytes(), (folder / "steps.csv").read_bytes()) == before
    assert [e["event"] for e in events] == ["start", "end"]
    assert events[0]["done"] == 14


def test_an_interrupted_run_ends_in_the_same_bits(finished, tmp_path):
    def interrupt(event):
        if event["event"] == "network" and event["done"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ticket(out=tmp_path / "run", **TINY, workers=1, progress=interrupt)
    assert 4 <= len(rows(tmp_path / "run")) < 14
    run_ticket(out=tmp_path / "run", **TINY, workers=1)
    for table in ("results.csv", "curves.csv"):
        assert rows(tmp_path / "run", table) == rows(finished[0], table)


@pytest.mark.filterwarnings("error:a worker process")
def test_worker_processes_do_not_change_the_results(finished, tmp_path):
    run_ticket(out=tmp_path / "run", **TINY, workers=3)
    for table in ("results.csv", "curves.csv"):
        assert rows(tmp_path / "run", table) == rows(finished[0], table)
    assert sorted(json.loads((tmp_path / "run" / "summary.json").read_text())["ops"]["sample_"]) == ["numba"]


def test_the_callers_thread_count_is_given_back(finished, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(InitPerfError):
        run_ticket("mnist", tmp_path / "nowhere", tmp_path / "run")
    run_ticket(out=finished[0], **TINY)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": "imagenet"}, "digits, mnist"),
        ({"recipe": "lenet"}, "lenet-paper"),
        ({"recipe": "lenet-paper"}, "the four MNIST files"),
        ({"recipe": "lenet-paper", "data": "digits"}, "which is for mnist"),
        ({"data": "mnist"}, "--data-dir"),
        ({"controls": ["nothing"]}, "controls"),
    ],
)
def test_wrong_arguments_write_nothing(tmp_path, given, message):
    with pytest.raises(InitPerfError, match=message):
        run_ticket(out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_training_and_evaluation_visit_what_they_should():
    from initperf.experiments.data import digits
    from initperf.experiments.training import evaluate

    split = digits().val
    model = mlp(64, (20,), 10)
    loss, accuracy = evaluate(model, split)
    scores = model(split.x).detach()
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(scores, split.y)), rel=1e-5)
    assert accuracy == float((scores.argmax(1) == split.y).double().mean())
    assert model.training


def test_workers_are_started_only_where_they_pay():
    assert tickets._default_workers(100) == 1
    assert tickets._default_workers(10**6) >= 1


def test_every_control_trains_and_the_report_reads_it(tmp_path):
    controls = ["reinit", "sign-reinit", "shuffle", "random", "small-dense"]
    folder = run_ticket(out=tmp_path / "run", rounds=1, iterations=4, trials=1, controls=controls, workers=1)
    run = read_run(folder)
    assert set(run.kinds) == {"ticket", *controls}
    small = next(r for r in run.rows if r.kind == "small-dense")
    assert 0.8 * run.density(1) < small.density <= run.density(1)


def test_a_batch_larger_than_the_training_set_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InitPerfError, match="Expected a batch of at most the .* training images. Got 5000"):
        run_ticket("digits", out=out, batch=5000)
    assert not out.exists()
