"""The examples run, stop anywhere, and go on to the same numbers: a plain loop, Lightning's Trainer, Hugging Face's Trainer."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from initperf.report.numbers.results import read_run
from initperf.ticket import Ticket
from initperf.tickets.run import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"plain_loop": "torch", "lightning_trainer": "lightning", "hugging_face_trainer": "transformers"}
TINY = {"rounds": 2, "iterations": 6, "evaluate_every": 3, "batch": 20}


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load(name):
    pytest.importorskip(NEEDS[name])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(folder):
    with open(folder / "results.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs_and_goes_on_after_a_stop_to_the_same_numbers(name, tmp_path, monkeypatch, capsys):
    main = load(name).main
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(whole, **TINY)
    assert f"initperf report {whole}" in capsys.readouterr().out
    run = read_run(whole)
    assert run.kinds[:2] == ["ticket", "reinit"]
    assert {row.iterations for row in run.rows} == {6}
    assert [row["layers"] for row in rows(whole) if row["kind"] == "ticket"] == ["dense", "masked", "sparse"]
    assert len({row["early_stop_val_loss"] for row in rows(whole)}) == len(rows(whole))  # every network is its own
    assert Ticket.load(whole / "tickets/trial0-level2.safetensors").density < 0.3

    own, calls = Run.log, 0

    def log(self, *args, **values):
        nonlocal calls
        calls += 1
        if calls == 6:  # in the third network
            raise Stop
        own(self, *args, **values)

    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(Stop):
        main(cut, **TINY)
    assert len(rows(cut)) == 2
    monkeypatch.setattr(Run, "log", own)
    main(cut, **TINY)
    assert rows(cut) == rows(whole)
