"""The command line: what it prints, and that every foreseeable problem is one line on stderr with nothing half-written."""

import csv
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fake_run import write_run
from initperf import __version__
from initperf.cli.main import main
from initperf.report.numbers.results import read_run

TINY = ("--rounds", "1", "--iterations", "40", "--trials", "2", "--controls", "reinit", "--workers", "1")


@pytest.fixture
def call(capsys):
    """main(arguments) -> (exit code, stdout, stderr)."""

    def invoke(*arguments) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return invoke


@pytest.fixture
def refused(call):
    """main(arguments) must fail with one line on stderr, which is returned."""

    def invoke(*arguments, code: int = 1) -> str:
        found, out, err = call(*arguments)
        assert found == code, err
        assert not out
        assert err.startswith("initperf: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return invoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny real run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["ticket", *TINY, "--out", str(folder)]) == 0
    return folder


def results_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


def test_version_is_the_packages(call):
    assert call("--version") == (0, f"initperf {__version__}\n", "")


def test_no_command_shows_the_help(call):
    code, out, err = call()
    assert code == 2
    assert "ticket" in out + err


def test_a_ticket_run_prints_every_level_and_writes_the_report(finished, call):
    run = read_run(finished)
    code, out, err = call("ticket", *TINY, "--out", finished)
    assert (code, err) == (0, "")
    for expected in (
        "100%",
        "re-initialized",
        "dense / masked",
        "ticket file",
        "reduced budget",
        "ran on the plain-torch reference",
    ):
        assert expected in out
    assert f"{100 * run.density(1):.3g}%" in out
    assert "finished before" in out
    assert str(finished / "report.html") in out
    assert {p.name for p in finished.glob("tickets/*")} >= {"trial0-level1.safetensors", "trial1-level1.safetensors"}


def test_the_same_command_again_trains_nothing(finished, call):
    before = {
        p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name in ("results.csv", "curves.csv", "steps.csv")
    }
    text = (finished / "results.csv").read_bytes()
    assert call("ticket", *TINY, "--out", finished)[0] == 0
    assert (finished / "results.csv").read_bytes() == text
    assert len(before) == 3


def test_every_control_and_any_number_of_the_recipe_can_be_asked_for(call, tmp_path):
    given = [
        "--rounds",
        "1",
        "--trials",
        "1",
        "--iterations",
        "4",
        "--workers",
        "1",
        "--set",
        "evaluate_every=2",
        "--set",
        "hidden=20,10",
    ]
    code, out, err = call("ticket", *given, "--controls", "all", "--control-lrs", "6e-4", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert "UCI optical digits" in out
    assert "Less than the recipe: rounds 1 of 3, iterations 4 of 600, trials 1 of 5" in out
    assert "trained on compressed layers" in out
    found = results_of(tmp_path / "run")
    assert {r["kind"] for r in found} == {"ticket", "reinit", "sign-reinit", "shuffle", "random", "small-dense"}
    assert len(found) == 2 * (1 + 6)
    assert json.loads((tmp_path / "run/config.json").read_text())["hidden"] == [20, 10]


def test_other_settings_in_the_same_folder_are_refused(finished, refused):
    before = results_of(finished)
    assert "iterations" in refused("ticket", *TINY, "--iterations", 50, "--out", finished)
    assert results_of(finished) == before


def heeding_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_says_how_to_go_on_and_the_same_command_ends_with_the_same_numbers(tmp_path):
    """A real SIGINT in the second network, which trains long enough to be met; then the same command."""
    arguments = [*TINY, "--iterations", "1000"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    seen = []
    for attempt in range(4):  # Python loses a KeyboardInterrupt that falls into a callback or a finalizer
        folder = tmp_path / f"run{attempt}"
        command = [sys.executable, "-m", "initperf.cli.main", "ticket", *arguments, "--out", str(folder)]
        started = subprocess.Popen(
            command,
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heeding_ctrl_c,
        )
        limit = time.monotonic() + 120
        while not list(folder.glob("networks/*.json")) and time.monotonic() < limit and started.poll() is None:
            time.sleep(0.002)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=120)
        seen.append((started.returncode, err))
        if started.returncode == 130 and err.count("\n") == 1:
            break
    assert started.returncode == 130, seen
    assert err.count("\n") == 1, seen
    assert "the same command again goes on" in err
    assert not (folder / "report.html").exists()
    for out in (folder, tmp_path / "undisturbed"):
        assert main(["ticket", *arguments, "--out", str(out)]) == 0
    assert results_of(folder) == results_of(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--data", "cifar"),
        ("--rounds", "-1"),
        ("--rounds", "two"),
        ("--iterations", "0"),
        ("--iterations", "1e3"),
        ("--trials", "0"),
        ("--batch", "0"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--seed", "-1"),
        ("--no-such-option",),
        ("surplus",),
    ],
    ids=" ".join,
)
def test_wrong_usage_of_ticket_is_one_line_and_leaves_nothing(arguments, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "initperf ticket --help" in refused("ticket", *arguments, code=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--controls", "luck"), "luck"),
        (("--seed", 2**64), "seed"),
        (("--recipe", "soup"), "soup"),
        (("--budget", "endless"), "endless"),
        (("--recipe", "lenet-paper"), "mnist"),
        (("--data", "mnist"), "--data-dir"),
        (("--data", "mnist", "--data-dir", "nowhere"), "nowhere"),
        (("--data", "mnist", "--data-dir", "."), "train-images-idx3-ubyte"),
        (("--lr", "inf"), "lr"),
        (("--lr", "0"), "lr"),
        (("--control-lrs", "1e-3,fast"), "learning_rates"),
        (("--control-lrs", "0"), "learning_rates"),
        (("--set", "wamup=3"), "warmup"),
        (("--set", "warmup"), "NAME=VALUE"),
        (("--data-dir", "nowhere"), "nowhere"),
        (("--recipe", "conv2"), "CIFAR-10"),
        (("--recipe", "conv2", "--data", "mnist"), "a recipe for mnist"),
    ],
)
def test_a_wrong_value_for_ticket_is_one_line_and_leaves_nothing(arguments, expected, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in refused("ticket", *arguments, "--out", "run")
    assert not list(tmp_path.iterdir())


def places_that_cannot_be_written(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("mine")
    yield occupied
    yield occupied / "below"
    if Path("/proc/self").is_dir():
        yield Path("/proc/initperf-run")
    if hasattr(os, "geteuid") and os.geteuid():
        closed = tmp_path / "closed"
        closed.mkdir()
        closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
        yield closed
        yield closed / "run"


@pytest.mark.parametrize("command", ["ticket", "variance"])
def test_an_output_folder_that_cannot_be_written_is_one_line(command, refused, tmp_path):
    for place in places_that_cannot_be_written(tmp_path):
        assert str(place) in refused(command, "--out", place)
    assert (tmp_path / "file").read_text() == "mine"


def test_report_prints_what_ticket_printed_and_compares(call, tmp_path):
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", seed=1)
    code, out, err = call("report", run, "--compare", other)
    assert (code, err) == (0, "")
    assert "At 4.2% of the weights the ticket reaches" in out
    assert "Compared with other" in (run / "report.html").read_text()
    assert not (other / "report.html").exists()


def test_an_experiment_prints_its_table_and_names_its_files(call, tmp_path):
    code, out, _ = call("experiment", "larger-init", "--out", tmp_path, "--iterations", "4", "--trials", "1")
    assert code == 0
    assert "Larger initial weights" in out
    assert "Reduced budget" in out
    for end in ("csv", "svg", "json"):
        assert (tmp_path / f"larger-init.{end}").is_file()
    assert not (tmp_path / "report.html").exists()


def test_report_of_something_else_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    run = write_run(tmp_path / "run")
    for place in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        assert str(place) in refused("report", place)
        assert str(place) in refused("report", run, "--compare", place)
    assert not (run / "report.html").exists()


def test_inspect_shows_a_tickets_parameters_survivors_and_hash(finished, call):
    path = finished / "tickets/trial0-level1.safetensors"
    code, out, err = call("inspect", path)
    assert (code, err) == (0, "")
    for expected in ("fc1.weight", "300 x 64", "normal(0,", "SHA-256", "(proven)", "RNG contract version"):
        assert expected in out


def test_inspect_of_a_checkpoint_names_how_it_was_initialized(call, tmp_path):
    torch.manual_seed(0)
    linear = torch.nn.Linear(400, 300)
    torch.nn.init.kaiming_normal_(linear.weight)
    torch.save(linear.state_dict(), tmp_path / "a.pt")
    save_file(linear.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        code, out, err = call("inspect", tmp_path / name)
        assert (code, err) == (0, "")
        assert "weight" in out
        assert "kaiming" in out.lower()


def test_export_writes_the_tickets_weights_dense(finished, call, tmp_path):
    from initperf.ticket import Ticket

    path, target = finished / "tickets/trial0-level1.safetensors", tmp_path / "dense.safetensors"
    code, out, err = call("export", path, "--dense", target)
    assert (code, err) == (0, "")
    assert f"{target.stat().st_size:,} bytes" in out
    expected = Ticket.load(path).weights()
    got = load_file(target)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name].view(torch.int32), expected[name].view(torch.int32)) for name in got)


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_a_ticket_is_read_by_a_process_that_has_imported_nothing_else(command, finished, tmp_path):
    """What an op needs must not depend on which modules were imported before."""
    target = ("--dense", str(tmp_path / "dense.safetensors")) if command == "export" else ()
    path = str(finished / "tickets/trial0-level1.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "initperf.cli.main", command, path, *target], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def damaged_files(tmp_path, ticket: Path):
    data = ticket.read_bytes()
    for name, content in {
        "empty": b"",
        "noise": bytes(range(256)) * 4,
        "truncated": data[: len(data) // 2],
        "short": data[:-1],
        "flipped": data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    }.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        yield path
    yield tmp_path / "absent.safetensors"
    yield tmp_path


def test_a_damaged_or_absent_file_is_one_line_and_nothing_is_exported(finished, refused, tmp_path):
    target = tmp_path / "dense.safetensors"
    for path in damaged_files(tmp_path, finished / "tickets/trial0-level1.safetensors"):
        assert str(path) in refused("inspect", path)
        assert str(path) in refused("export", path, "--dense", target)
    assert not target.exists()


def test_export_to_a_place_that_cannot_be_written_is_one_line(finished, refused, tmp_path):
    ticket = finished / "tickets/trial0-level1.safetensors"
    for target in (tmp_path / "no/folder.safetensors", tmp_path):
        assert str(target) in refused("export", ticket, "--dense", target)
    assert not list(tmp_path.iterdir())


def test_doctor_finds_every_op_equal_to_its_reference(call):
    code, out, err = call("doctor", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert set(found["ops"]) >= {
        "sample_",
        "masked_linear",
        "sparse_linear",
        "masked_conv2d",
        "moments",
        "kth_smallest",
    }
    assert {name: op["equal"] for name, op in found["ops"].items() if op["equal"] is not True} == {}
    assert all(op["backend"]["cpu"] == "numba" for op in found["ops"].values())
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )


def test_doctor_says_what_is_slow_and_what_to_do(call, monkeypatch):
    from initperf import ops

    monkeypatch.setenv("INITPERF_BACKEND", "reference")
    assert "INITPERF_BACKEND=reference is set" in call("doctor", "--no-check")[1]
    monkeypatch.delenv("INITPERF_BACKEND")
    monkeypatch.setattr(ops, "_failure", lambda compiler: "is not installed")
    monkeypatch.setattr("initperf.cli.doctor._version", lambda name: None if name == "numba" else "1")
    assert "pip install --upgrade numba" in call("doctor", "--no-check")[1]


def test_doctor_says_that_the_choice_of_products_is_overridden(call):
    from initperf.choice import prefer

    with prefer("dense"):
        assert "INITPERF_PRODUCTS=dense is set" in call("doctor", "--no-check")[1]
    assert "INITPERF_PRODUCTS" not in call("doctor", "--no-check")[1]


@pytest.mark.parametrize(("why", "said"), [("", "yes (the kernel tells"), ("because", "no (because)")])
def test_doctor_says_whether_unchanged_weights_are_kept(call, monkeypatch, why, said):
    monkeypatch.setattr("initperf.cli.doctor.why_not", lambda: why)
    assert said in call("doctor", "--no-check")[1]


def test_doctor_checks_every_op_in_a_process_that_has_called_none():
    from initperf.cli import selfcheck

    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-m", "initperf", "doctor", "--json"], capture_output=True, text=True)
    found = json.loads(done.stdout)["ops"]
    assert set(found) == set(selfcheck.CHECKS)
    assert all(op["equal"] for op in found.values())


def test_doctor_fails_when_a_kernel_disagrees(call, monkeypatch):
    from initperf.cli import selfcheck

    def wrong(launch, device):
        return [torch.zeros(1) if "reference" in launch.__module__ else torch.tensor([-0.0])]

    monkeypatch.setitem(selfcheck.CHECKS, "sample_", wrong)
    code, out, _ = call("doctor", "--json")
    assert code == 1
    assert json.loads(out)["ops"]["sample_"]["equal"] is False


def test_doctor_says_which_kernel_would_run_on_a_gpu_that_this_machine_lacks(call, refused, finished):
    code, out, _ = call("doctor", "--gpu", "h100", "--dtype", "float32", "--tf32")
    assert code == 0
    assert "h100 (sm_90), float32, TF32: predicted, not measured" in out
    assert "dense" in out
    out = call("doctor", "--gpu", "mi300x", "--ticket", finished / "tickets/trial0-level1.safetensors")[1]
    assert "live tiles" in out
    assert "weight" in out
    assert "gpu to be one of" in refused("doctor", "--gpu", "gtx1080")
