"""The folder of a ticket run: what is finished, as one record a trained network, and the tables made from the records.

Every file is written whole, so a run may be killed at any moment, and several processes may share a folder: a network is
trained by whoever holds its lock. The tables depend on the records alone, not on who wrote them when.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from initperf.core.checks import InitPerfError, fail
from initperf.core.files import FileLock, make_folder, write_atomically

KINDS = ("ticket", "reinit", "sign-reinit", "shuffle", "random", "small-dense")
RESULTS = [
    "trial",
    "level",
    "kind",
    "density",
    "iterations",
    "early_stop_iteration",
    "early_stop_val_loss",
    "early_stop_test_accuracy",
    "final_test_accuracy",
    "iterations_to_dense_best",
    "seed",
    "train_seconds",
    "repeat",
    "lr",
    "layers",
]
CURVES = [
    "trial",
    "level",
    "kind",
    "iteration",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "test_accuracy",
    "repeat",
    "lr",
]
_MOVED = [f"{part}_{name}" for part in ("kept", "pruned") for name in ("moved", "grew", "flipped")]
MOVEMENT = ["trial", "level", "parameter", "weights", "survivors", *_MOVED, *(f"null_{name}" for name in _MOVED)]
STEPS = ["level", "density", "batch", "dense_ms", "masked_ms", "sparse_ms", "layers"]
MAY_GROW = ("trials", "rounds")
MAY_DIFFER = (*MAY_GROW, "budget", "reduced")  # the label of what is reduced follows what grew
TABLE_SECONDS = 30.0  # curves.csv grows with every network and is written anew: not more often than this


class Network(NamedTuple):
    """One network to train; level 0 is the dense one, kind "ticket". Several re-initializations differ in `repeat`.

    lr: a learning rate beside the search's own (None): the same start and mask, trained at another rate.
    """

    trial: int
    level: int
    kind: str
    repeat: int = 0
    lr: float | None = None

    @property
    def name(self) -> str:
        repeat = f"-{self.repeat}" if self.repeat else ""
        return f"trial{self.trial}-level{self.level}-{self.kind}{repeat}" + (f"-lr{self.lr!r}" if self.lr else "")

    @property
    def order(self) -> tuple[float, ...]:
        return self.trial, self.level, KINDS.index(self.kind), self.repeat, self.lr or 0


class RunFolder:
    """A run folder, opened for writing."""

    def __init__(self, path: str | Path) -> None:
        self.path = make_folder(path)
        self.networks = make_folder(self.path / "networks")
        self.tickets = make_folder(self.path / "tickets")
        self._records: dict[str, dict[str, Any]] = {}
        self.trials = self.rounds = 0

    def claim_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json, or check that the one there is the same, all but MAY_DIFFER, and let it grow."""
        config = json.loads(json.dumps(config))
        path = self.path / "config.json"
        with FileLock(self.networks / "tables.lock"):
            found = {}
            if path.exists():
                _check_same(config, found := self.read_config(), self.path)
            if (grown := _grown(found, config)) != found:
                write_atomically(path, json.dumps(grown, indent=1) + "\n")
        self.read_size()

    def read_size(self) -> None:
        """How many trials and rounds the folder has by now: another process may have let it grow."""
        config = self.read_config()
        self.trials, self.rounds = config["trials"], config["rounds"]

    def read_config(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "config.json").read_text()))
        except (OSError, ValueError) as error:
            fail(f"a run's config.json in {self.path}", f"{error}. Name another folder")

    def record(self, network: Network) -> dict[str, Any] | None:
        """The record of a finished network, else None.

        A ticket that was the last of its trial when it was trained, and no longer is, is to be trained again, to the same
        bits: the mask of the next level comes from its final weights.
        """
        if network.name not in self._records:
            path = self.networks / f"{network.name}.json"
            if not path.exists():
                return None
            found = json.loads(path.read_text())
            prunes = network.kind == "ticket" and network.lr is None and network.level < self.rounds
            if prunes and not (found["movement"] and self.ticket(network.trial, network.level + 1).exists()):
                return None
            self._records[network.name] = found
        return self._records[network.name]

    def finish(self, network: Network, record: Mapping[str, Any], networks: Iterable[Network]) -> None:
        """Keep the record of `network`, drop its checkpoint, and write the tables anew (all of them now and then)."""
        write_atomically(self.networks / f"{network.name}.json", json.dumps(record))
        self.checkpoint(network).unlink(missing_ok=True)
        curves = self.path / "curves.csv"
        self.write_tables(networks, whole=not curves.exists() or time.time() - curves.stat().st_mtime > TABLE_SECONDS)

    def write_tables(self, networks: Iterable[Network], *, whole: bool = True) -> None:
        """results.csv, and if `whole` curves.csv and movement.csv, from the records of the finished ones of `networks`."""
        with FileLock(self.networks / "tables.lock"):
            for name in ("results", "curves", "movement", "config"):
                for path in self.path.glob(f".{name}.*"):  # of a killed process: this one has the lock
                    path.unlink(missing_ok=True)
            done = [(n, r) for n in sorted(networks, key=lambda n: n.order) if (r := self.record(n)) is not None]
            write_csv(self.path / "results.csv", RESULTS, [r["row"] for _, r in done])
            if not whole:
                return
            points = [{**r["row"], **p} for _, r in done for p in r["points"]]
            write_csv(self.path / "curves.csv", CURVES, points)
            moved = [{**m, "trial": n.trial, "level": n.level} for n, r in done for m in r.get("movement", ())]
            write_csv(self.path / "movement.csv", MOVEMENT, moved)

    def lock(self, network: Network) -> FileLock:
        return FileLock(self.networks / f"{network.name}.lock")

    def checkpoint(self, network: Network) -> Path:
        return self.networks / f"{network.name}.checkpoint"

    def clear(self, network: Network) -> None:
        """Remove what a killed process left half written; only for the holder of the network's lock."""
        stale = [self.networks.glob(f".{network.name}.*")]
        if (
            network.kind == "ticket" and network.lr is None
        ):  # one holder in a trial at a time, since each level needs the last
            places = ((self.tickets, "*"), (self.networks, "rewind*"), (self.networks, "*-kept*"))
            stale += [folder.glob(f".trial{network.trial}-{name}") for folder, name in places]
        for path in itertools.chain(*stale):
            path.unlink(missing_ok=True)

    def kept(self, trial: int, level: int) -> Path:
        """Parameters and buffers that the networks of this level take over from the trained ones of the level before."""
        return self.networks / f"trial{trial}-level{level}-kept.safetensors"

    def rewind_point(self, trial: int) -> Path:
        """Weights and buffers of the dense network at the iteration to which the tickets are rewound."""
        return self.networks / f"trial{trial}-rewind.safetensors"

    def ticket(self, trial: int, level: int) -> Path:
        return self.tickets / f"trial{trial}-level{level}.safetensors"


def write_csv(path: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Floats in full (they read back to the same bits), None as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _grown(found: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a folder after a run with `given`: the larger number of each of MAY_GROW, and its label."""
    grown = dict(given)
    for key in MAY_GROW:
        if found.get(key, 0) > given[key]:
            grown[key] = found[key]
            less = {k: v for k, v in (given.get("reduced") or {}).items() if k != key}
            less |= {k: v for k, v in (found.get("reduced") or {}).items() if k == key}
            if isinstance(given.get("reduced"), dict):
                grown["reduced"] = less
                if not less and "budget" in given:
                    grown["budget"] = None
    return grown


def _check_same(given: Mapping[str, Any], found: Mapping[str, Any], folder: Path) -> None:
    for key in sorted({*given, *found}):
        a, b = given.get(key), found.get(key)
        if a != b and key not in MAY_DIFFER:
            raise InitPerfError(
                f"Expected the configuration of the run in {folder}: {key} = {json.dumps(b)}. Got {json.dumps(a)}. "
                "Give the same to continue that run, or another folder for a new one."
            )
