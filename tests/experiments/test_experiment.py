"""The built-in LeNet experiment: recipes as published, a whole run folder, the same bits however it is run."""

import csv
import json
import random
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from initperf import choice
from initperf.core.checks import InitPerfError
from initperf.experiments import tickets, training
from initperf.experiments.data import cifar, sets
from initperf.experiments.networks import mlp
from initperf.experiments.tickets import run_ticket
from initperf.report.numbers.results import read_run
from initperf.ticket import Ticket

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
    steps = rows(folder, "steps.csv")
    assert all(float(s["sparse_ms"]) > 0 for s in steps)
    assert [s["layers"] for s in steps] == ["dense", "sparse", "sparse"]  # 35% survive the first round
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
    assert summary["ops"]["sparse_chain_training"].keys() == {"numba"}  # training, layers together
    assert summary["ops"]["sparse_chain"].keys() == {"numba"}  # and evaluation


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
    from initperf.experiments.data.sets import digits
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


def test_the_log_says_what_compressed_layers_saved(finished):
    folder, events = finished
    told = next(e for e in events if e["event"] == "steps")
    steps = {int(s["level"]): s for s in rows(folder, "steps.csv")}
    expected = sum(  # 2 trials of 3 networks, 8 iterations
        2 * 3 * 8 * (float(steps[level]["dense_ms"]) - float(steps[level]["sparse_ms"])) / 1000 for level in (1, 2)
    )
    assert (told["trained"], told["below"]) == (12, 0.4)
    assert told["saved_to_dense"] == pytest.approx(expected, abs=0.051)
    assert json.loads((folder / "summary.json").read_text())["sparse"]["trained"] == 12


def test_masked_layers_alone_can_be_asked_for(tmp_path):
    folder = run_ticket(out=tmp_path / "run", rounds=1, iterations=4, trials=1, workers=1, settings=["sparse=0"])
    assert {row["layers"] for row in rows(folder)} == {"dense", "masked"}


def idx(array):
    return struct.pack(">i", 0x800 + array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder of MNIST's format that is not MNIST: 5,100 and 50 images of 28 x 28, in 3 classes."""
    folder, g = tmp_path / "fashion", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 5100), ("t10k", 50)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(g.integers(0, 200, (count, 28, 28), dtype=np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 3).astype(np.uint8)))
    return folder


def test_another_set_of_mnists_format_needs_its_folder_alone(fashion, tmp_path):
    given = {"rounds": 1, "iterations": 4, "trials": 1, "workers": 1, "controls": ()}
    folder = run_ticket(data_dir=fashion, out=tmp_path / "run", **given)
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"], config["data"], config["dataset"]) == ("lenet-paper", "mnist", "fashion")
    assert config["reduced"] == {
        "iterations": "4 of 50,000",
        "rounds": "1 of 20",
        "trials": "1 of 5",
        "reinits": "1 of 3",
    }
    assert "not MNIST itself" in config["attribution"]
    assert "mean 0.3902, std 0.2265 (measured on its training images)" in config["attribution"]
    assert read_run(folder).density(1) == pytest.approx(0.8, abs=0.001)
    named = run_ticket(recipe="lenet-paper", data_dir=fashion, out=tmp_path / "named", **given)
    assert rows(named) == rows(folder)


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """CIFAR-10's binary layout with 60 and 12 images."""
    for name, value in (("TRAIN", 60), ("TEST", 12), ("VALIDATION", 20)):
        monkeypatch.setattr(cifar, name, value)
    folder, g = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        records = g.integers(0, 256, (12, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


def test_a_convolutional_recipe_trains_with_every_control(tiny_cifar, tmp_path):
    controls = ("reinit", "sign-reinit", "shuffle", "random", "small-dense")
    folder = run_ticket(
        recipe="conv4",
        data_dir=tiny_cifar,
        out=tmp_path / "run",
        controls=controls,
        workers=1,
        settings=["channels=4,4,8,8", "hidden=6,6", "batch=10", "iterations=3", "rounds=1", "trials=1", "reinits=2"],
    )
    found, config = rows(folder), json.loads((folder / "config.json").read_text())
    assert [r["kind"] for r in found] == ["ticket", "ticket", "reinit", "reinit", *controls[1:]]
    assert (config["dataset"], config["recipe"]) == ("cifar10", "conv4")
    assert "official binary files" in config["attribution"]
    assert "conv4.weight" in Ticket.load(folder / "tickets/trial0-level1.safetensors").masks
    assert len(rows(folder, "steps.csv")) == 2


def test_cifar_is_told_by_its_files_and_anything_else_is_named(tiny_cifar, tmp_path):
    assert sets.kind_of(tiny_cifar) == "cifar10"
    with pytest.raises(InitPerfError, match="IDX files or CIFAR-10"):
        run_ticket(data_dir=tmp_path / "nothing", out=tmp_path / "run")


def test_other_learning_rates_and_criteria_run_with_worker_processes(tmp_path):
    given = {"rounds": 1, "iterations": 4, "trials": 1, "controls": ["reinit"], "workers": 2}
    folder = run_ticket(
        out=tmp_path / "run", **given, settings=["learning_rates=6e-4,1.2e-3,2.4e-3", "criterion=synflow"]
    )
    found = rows(folder)
    assert sorted(float(r["lr"]) for r in found) == [6e-4] * 3 + [1.2e-3] * 3 + [2.4e-3] * 3
    config = json.loads((folder / "config.json").read_text())
    assert (config["learning_rates"], config["criterion"]) == ([6e-4, 2.4e-3], "synflow")


def test_warm_up_grows_the_learning_rate_linearly(tmp_path, monkeypatch):
    rates, own = [], training.step

    def step(model, optimizer, x, y):
        rates.append(optimizer.param_groups[0]["lr"])
        return own(model, optimizer, x, y)

    monkeypatch.setattr(training, "step", step)
    monkeypatch.setattr(tickets, "_measure", lambda *_: [])
    run_ticket(out=tmp_path / "run", rounds=0, iterations=6, trials=1, workers=1, lr=0.01, settings=["warmup=4"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_calibration_of_this_machine_does_not_change_a_run(finished, tmp_path, monkeypatch):
    never = {kind: [[0.0] * len(choice.WEIGHTS)] * len(choice.ROWS) for kind in choice.built_in_table()}
    monkeypatch.setattr(choice, "measured", lambda threads: never)
    choice.forget()
    try:
        assert not choice.sparse_pays("sparse_linear", 60, (300, 784), 1000, torch.float32, "cpu")
        run_ticket(out=tmp_path / "run", **TINY, workers=1)
    finally:
        choice.forget()
    for table in ("results.csv", "curves.csv"):
        assert rows(tmp_path / "run", table) == rows(finished[0], table)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_the_command_killed_at_ten_random_moments_with_its_workers_ends_in_the_same_bits(tmp_path):
    def command(name):
        given = ["--iterations", "300", "--rounds", "3", "--trials", "2", "--workers", "2"]
        return subprocess.Popen(
            [sys.executable, "-m", "initperf.cli.main", "ticket", *given, "--out", str(tmp_path / name)],
            stdout=subprocess.DEVNULL,
        )

    assert command("whole").wait(600) == 0
    moments = random.Random(0)
    for kill in range(10):
        process = command("cut")
        while len(list((tmp_path / "cut").glob("networks/*.json"))) < kill:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        assert process.poll() is None
        process.kill()
        process.wait()
    assert command("cut").wait(600) == 0
    for table in ("results.csv", "curves.csv", "movement.csv"):
        assert rows(tmp_path / "cut", table) == rows(tmp_path / "whole", table)
    for path in (tmp_path / "whole/tickets").iterdir():
        assert (tmp_path / "cut/tickets" / path.name).read_bytes() == path.read_bytes()
