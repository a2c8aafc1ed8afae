"""TicketSearch: exact pruning, survivors at their initial bits, honest controls, and the same end however often interrupted."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initperf.core.checks import InitPerfError
from initperf.search import TicketSearch
from initperf.ticket import Ticket
from initperf.tickets.run_folder import RunFolder
from searches import X, Y, make_model, make_small, search, train
from tolerance import bits


def interrupted(networks, stop):
    """Train, and be interrupted at iteration 7 of network number `stop`."""
    try:
        for i, run in enumerate(networks):
            train(run, interrupt_at=7 if i == stop else None)
    except KeyboardInterrupt:
        return
    raise AssertionError("not interrupted")


def train_all(networks, **log):
    for run in networks:
        run.log(1, **log)


def rows(folder, table="results.csv"):
    with open(folder / table, newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny networks: a second thread only waits, on a busy machine for milliseconds an op."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An undisturbed run with every control, and what each network started with."""
    folder = tmp_path_factory.mktemp("run")
    seen = []
    controls = ("reinit", "sign-reinit", "shuffle", "random", "small-dense")
    for run in search(folder, controls=controls, make_small=make_small):
        weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        seen.append((run, weights))
        train(run)
    return folder, seen


def started(finished, trial, level, kind):
    return next(s for s in finished[1] if (s[0].trial, s[0].level, s[0].kind) == (trial, level, kind))


def test_every_level_prunes_exactly_the_fraction_of_its_survivors(finished):
    expected = {"fc1.weight": [192, 96, 48], "fc2.weight": [64, 48, 36]}
    for trial in (0, 1):
        for level in (1, 2):
            run, _ = started(finished, trial, level, "ticket")
            assert {n: int(m.sum()) for n, m in run.masks.items()} == {n: c[level] for n, c in expected.items()}
            assert run.density == sum(c[level] for c in expected.values()) / 256


def test_survivors_start_at_their_initial_bits_in_every_level_and_nothing_pruned_returns(finished):
    for trial in (0, 1):
        _, first = started(finished, trial, 0, "ticket")
        old = None
        for level in (1, 2):
            run, weights = started(finished, trial, level, "ticket")
            for name, mask in run.masks.items():
                assert torch.equal(bits(weights[name]), bits(first[name].masked_fill(~mask, 0)))
                assert old is None or not (mask & ~old[name]).any()
            assert torch.equal(bits(weights["fc1.bias"]), bits(first["fc1.bias"]))
            old = run.masks


def test_pruned_weights_stay_zero_through_training(finished):
    for run, _ in finished[1]:
        for name, mask in run.masks.items():
            assert (run.model.get_parameter(name)[~mask] == 0).all()
            assert (run.model.get_parameter(name)[mask] != 0).any()


def test_reinit_keeps_the_mask_and_draws_other_weights(finished):
    ticket, initial = started(finished, 0, 1, "ticket")
    control, fresh = started(finished, 0, 1, "reinit")
    for name, mask in ticket.masks.items():
        assert torch.equal(control.masks[name], mask)
        assert not (fresh[name][mask] == initial[name][mask]).any()
    later, other = started(finished, 0, 2, "reinit")
    _, of_other_trial = started(finished, 1, 1, "reinit")
    for name, mask in later.masks.items():  # survivors of level 2 survive level 1 too
        assert not (other[name][mask] == fresh[name][mask]).any()
        both = mask & (of_other_trial[name] != 0)
        assert not (of_other_trial[name][both] == fresh[name][both]).any()


def test_repeated_reinitializations_differ_and_the_global_seed_goes_by_trial_and_level(tmp_path):
    weights, seeds = {}, {}
    for run in search(tmp_path / "run", rounds=1, controls=["reinit"], reinits=2):
        seeds.setdefault((run.trial, run.level), set()).add(torch.initial_seed())
        weights[run.trial, run.kind, run.repeat] = run.model.fc1.weight.detach().clone()
        run.log(1, val_loss=float("nan"))
        run.log(2, val_loss=0.5)
        run.log(3, val_loss=0.5)
    alive = weights[0, "reinit", 0] != 0
    assert not (weights[0, "reinit", 0][alive] == weights[0, "reinit", 1][alive]).any()
    assert all(len(s) == 1 for s in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 4
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open()))
    assert len(rows) == 2 * (2 + 2)
    assert {row["early_stop_iteration"] for row in rows} == {"2"}  # the first least loss, NaN passed over


def test_sign_reinit_keeps_the_initial_signs_only(finished):
    ticket, initial = started(finished, 0, 1, "ticket")
    _, fresh = started(finished, 0, 1, "sign-reinit")
    for name, mask in ticket.masks.items():
        assert torch.equal(fresh[name][mask].sign(), initial[name][mask].sign())
        assert not (fresh[name][mask] == initial[name][mask]).any()


def test_shuffle_moves_the_mask_within_layers_and_keeps_the_initial_weights(finished):
    ticket, _ = started(finished, 0, 1, "ticket")
    control, weights = started(finished, 0, 1, "shuffle")
    _, dense = started(finished, 0, 0, "ticket")
    for name, mask in ticket.masks.items():
        moved = control.masks[name]
        assert int(moved.sum()) == int(mask.sum())
        assert not torch.equal(moved, mask)
        assert torch.equal(bits(weights[name]), bits(dense[name].masked_fill(~moved, 0)))


def test_random_has_the_ticket_layer_densities_and_nothing_else(finished):
    ticket, _ = started(finished, 0, 1, "ticket")
    control, weights = started(finished, 0, 1, "random")
    _, dense = started(finished, 0, 0, "ticket")
    for name, mask in ticket.masks.items():
        assert int(control.masks[name].sum()) == int(mask.sum())
        both = mask & control.masks[name]
        assert not (weights[name][both] == dense[name][both]).any()


def test_small_dense_has_about_as_many_weights(finished):
    control, weights = started(finished, 0, 1, "small-dense")
    assert control.masks == {}
    assert weights["fc1.weight"].shape == (9, 12)
    assert control.density == 9 * 16 / 256


def test_the_data_order_is_fresh_per_level_and_shared_by_the_kinds(finished):
    by_level = {}
    for run, _ in finished[1]:
        by_level.setdefault((run.trial, run.level), set()).add(run.data_seed)
    assert all(len(seeds) == 1 for seeds in by_level.values())
    assert len(set.union(*by_level.values())) == len(by_level)


def test_trials_have_seeds_of_their_own(finished):
    assert not torch.equal(
        started(finished, 0, 0, "ticket")[1]["fc1.weight"], started(finished, 1, 0, "ticket")[1]["fc1.weight"]
    )


def test_results_have_one_row_a_network_and_curves_every_log(finished):
    folder, seen = finished
    found = rows(folder)
    assert [(int(r["trial"]), int(r["level"]), r["kind"]) for r in found] == [
        (r.trial, r.level, r.kind) for r, _ in seen
    ]
    points = rows(folder, "curves.csv")
    assert len(points) == 3 * len(seen)
    for row in found:
        mine = [p for p in points if all(p[k] == row[k] for k in ("trial", "level", "kind"))]
        best = min(mine, key=lambda p: float(p["val_loss"]))
        assert (row["early_stop_iteration"], row["early_stop_val_loss"]) == (best["iteration"], best["val_loss"])
        assert (row["early_stop_test_accuracy"], row["final_test_accuracy"]) == (
            best["test_accuracy"],
            mine[-1]["test_accuracy"],
        )
        dense = next(r for r in found if r["trial"] == row["trial"] and r["level"] == "0")
        reached = [p["iteration"] for p in mine if float(p["val_loss"]) <= float(dense["early_stop_val_loss"])]
        assert row["iterations_to_dense_best"] == (reached[0] if reached else "")


def test_movement_is_told_for_every_layer_that_was_pruned(finished):
    found = rows(finished[0], "movement.csv")
    assert [(r["trial"], r["level"], r["parameter"]) for r in found] == [
        (t, level, p) for t in "01" for level in "01" for p in ("fc1.weight", "fc2.weight")
    ]
    assert [int(r["survivors"]) for r in found[:4]] == [96, 48, 48, 36]
    assert all(float(r["kept_moved"]) > 0 and float(r["null_kept_moved"]) > 0 for r in found)


def test_a_criterion_changes_the_masks(tmp_path):
    masks = {}
    for criterion in ("magnitude", "movement", "random"):
        for run in search(tmp_path / criterion, trials=1, rounds=1, controls=(), criterion=criterion):
            train(run)
        masks[criterion] = run.masks["fc1.weight"]
        assert int(masks[criterion].sum()) == 96
    assert not torch.equal(masks["magnitude"], masks["movement"])
    assert not torch.equal(masks["magnitude"], masks["random"])


def test_tickets_on_disk_are_the_networks_that_trained(finished):
    folder, _ = finished
    for level in (0, 1, 2):
        ticket = Ticket.load(folder / "tickets" / f"trial1-level{level}.safetensors")
        model = ticket.apply(make_model())
        _, weights = started(finished, 1, level, "ticket")
        assert all(torch.equal(bits(p), bits(weights[n])) for n, p in model.named_parameters())
        assert ticket.values == {}


def test_the_reference_runs_no_op(finished):
    folder, seen = finished
    for run, _ in seen:
        used = json.loads((folder / "networks" / f"{run.network.name}.json").read_text())["ops"]
        assert all("reference" not in backends for backends in used.values()), used
        assert used.keys() & {"sample_", "sample_many_"}


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        for run in search(tmp_path / name, trials=1, seed=seed):
            train(run)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert rows(tmp_path / "a", "curves.csv") == rows(tmp_path / "b", "curves.csv")
    assert rows(tmp_path / "a") != rows(tmp_path / "c")


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_a_run_interrupted_anywhere_ends_in_the_same_bits(tmp_path, stop):
    for run in search(tmp_path / "whole", trials=1):
        train(run)
    interrupted(search(tmp_path / "cut", trials=1, checkpoint_seconds=0), stop)
    resumed = []
    for run in search(tmp_path / "cut", trials=1, checkpoint_seconds=0):
        resumed.append(run)
        train(run)
    assert len(resumed) == 7 - stop
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert rows(tmp_path / "cut", "curves.csv") == rows(tmp_path / "whole", "curves.csv")
    assert not list((tmp_path / "cut").rglob("*.checkpoint"))


def test_a_checkpoint_within_a_level_continues_after_its_iteration(tmp_path):
    interrupted(search(tmp_path, checkpoint_seconds=0), 0)
    for run in search(tmp_path):
        optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-2)
        assert run.restore(optimizer=optimizer) == 7
        assert [p["iteration"] for p in run.points] == [4]
        assert len(optimizer.state) == 4
        break


def test_a_loop_left_with_break_repeats_that_network(tmp_path):
    for run in search(tmp_path):
        train(run)
        break
    first = next(iter(search(tmp_path)))
    assert (first.trial, first.level) == (0, 0)


def test_two_loops_in_one_process_do_not_wait_for_each_other(tmp_path):
    networks = iter(search(tmp_path, trials=1))
    next(networks)
    with pytest.raises(InitPerfError, match="one open loop"):
        next(iter(search(tmp_path, trials=1)))
    networks.close()
    assert next(iter(search(tmp_path, trials=1))).level == 0


NURSERY = """
import os, sys, tempfile, traceback
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from searches import search, train

def whole_run(out):
    for run in search(out, checkpoint_seconds=0.003, sparse=0.4):
        train(run, iterations=24)

with tempfile.TemporaryDirectory() as folder:
    whole_run(folder)
print("ready", flush=True)
for out in sys.stdin:
    child = os.fork()  # imports and compiled kernels take seconds to load, a fork none
    if not child:
        try:
            whole_run(out.strip())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """A process that has loaded everything and forks a run whenever asked."""

    def __init__(self):
        program = NURSERY.format(tests=str(Path(__file__).parents[1] / "support"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = False

    def start(self, out):
        """The process id of a run in `out`."""
        if not self.ready:
            self.ready = self.process.stdout.readline() == "ready\n"
            assert self.ready
        print(out, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def status(self):
        """How the run ended: 0, or the signal's number."""
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def nurseries():
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    both = [Nursery(), Nursery()]
    yield both
    for nursery in both:
        nursery.close()


@pytest.fixture(scope="module")
def undisturbed(nurseries, tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    nurseries[0].start(folder)
    assert nurseries[0].status() == 0
    return folder


def assert_same(folder, other):
    """Tables, tickets and configuration, to the bit; and nothing half written is left."""
    for table in ("results.csv", "curves.csv", "movement.csv"):
        assert rows(folder, table) == rows(other, table)
    for path in [*(other / "tickets").iterdir(), other / "config.json"]:
        assert (folder / path.relative_to(other)).read_bytes() == path.read_bytes()
    names = [{str(p.relative_to(f)) for p in f.rglob("*")} for f in (folder, other)]
    assert names[0] == names[1]


def test_a_run_killed_at_ten_random_moments_ends_in_the_same_bits(nurseries, undisturbed, tmp_path):
    moments, nursery, within = random.Random(0), nurseries[0], 0
    for kill in range(10):
        process = nursery.start(tmp_path)
        while len(list(tmp_path.glob("networks/*.json"))) < kill:  # of 14 networks: whatever else the machine does
            time.sleep(0.001)
        while kill % 2 and not list(tmp_path.glob("networks/*.checkpoint")):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05) / (1 + 9 * (kill % 2)))  # a network takes longer
        os.kill(process, signal.SIGKILL)
        assert nursery.status() == signal.SIGKILL
        within += bool(list(tmp_path.glob("networks/*.checkpoint")))
    assert within >= 2  # within the training of a network
    nursery.start(tmp_path)
    assert nursery.status() == 0
    assert_same(tmp_path, undisturbed)


def test_two_processes_share_a_run(nurseries, undisturbed, tmp_path):
    for nursery in nurseries:
        nursery.start(tmp_path)
    assert [nursery.status() for nursery in nurseries] == [0, 0]
    assert len(rows(tmp_path)) == 14
    assert_same(tmp_path, undisturbed)


def test_two_runs_at_the_same_time_do_not_touch_each_other(nurseries, undisturbed, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for nursery, folder in zip(nurseries, folders, strict=True):
        nursery.start(folder)
    assert [nursery.status() for nursery in nurseries] == [0, 0]
    for folder in folders:
        assert_same(folder, undisturbed)


def test_rewinding_to_iteration_k_gives_the_weights_of_that_iteration(tmp_path):
    found = {}
    for run in search(tmp_path, trials=1, rewind_to=5, controls=("reinit", "shuffle")):
        assert run.start == (5 if run.level and run.kind != "reinit" else 0)
        first = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        if run.level == 0:
            train(run, iterations=5)
            found["k"] = {n: p.detach().clone() for n, p in run.model.named_parameters()}
            optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
            F.cross_entropy(run.model(X), Y).backward()
            optimizer.step()
            run.log(6, val_loss=1.0)
        else:
            if run.kind != "reinit":
                for name, parameter in first.items():
                    expected = found["k"][name]
                    if name in run.masks:
                        expected = expected.masked_fill(~run.masks[name], 0)
                    assert torch.equal(bits(parameter), bits(expected))
            run.log(6, val_loss=1.0)
    ticket = Ticket.load(tmp_path / "tickets" / "trial0-level2.safetensors")
    assert ticket.seed is None
    assert ticket.values["fc1.weight"].numel() == 48


def test_rewinding_needs_step(tmp_path):
    with pytest.raises(InitPerfError, match=r"run\.step\(5\)"):
        train_all(search(tmp_path, rewind_to=5), val_loss=1.0)


def test_a_model_with_its_own_initialization_stores_the_survivors(tmp_path):
    def own(model, seed):
        nn.init.orthogonal_(model.fc1.weight)

    initial = []
    for run in search(tmp_path, trials=1, rounds=1, controls=(), init=own):
        initial.append(run.model.fc1.weight.detach().clone())
        train(run)
    mask = run.masks["fc1.weight"]
    assert torch.equal(bits(initial[1]), bits(initial[0].masked_fill(~mask, 0)))
    ticket = Ticket.load(tmp_path / "tickets" / "trial0-level1.safetensors")
    assert torch.equal(bits(ticket.weights()["fc1.weight"]), bits(initial[1]))


def test_global_scope_prunes_layers_unequally(tmp_path):
    for run in search(tmp_path, trials=1, rounds=1, controls=(), fractions=0.5, scope="global"):
        train(run)
    counts = [int(m.sum()) for m in run.masks.values()]
    assert sum(counts) == 128
    assert counts != [96, 32]


@pytest.mark.parametrize("change", [{"seed": 4}, {"fractions": 0.3}, {"controls": ()}, {"scope": "global"}])
def test_another_configuration_in_the_same_folder_is_refused(tmp_path, change):
    search(tmp_path)
    search(tmp_path)
    with pytest.raises(InitPerfError, match=f"{next(iter(change))} = .*another folder"):
        search(tmp_path, **change)


def test_trials_may_be_added_later(tmp_path):
    for run in search(tmp_path, trials=1):
        train(run)
    before = rows(tmp_path)
    assert search(tmp_path, trials=2).done == 7
    for run in search(tmp_path, trials=2):
        assert run.trial == 1
        train(run)
    assert rows(tmp_path)[:7] == before
    assert len(rows(tmp_path)) == 14


def test_rounds_may_be_added_later(tmp_path):
    for run in search(tmp_path / "whole"):
        train(run)
    for rounds in (1, 2, 1):
        for run in search(tmp_path / "grown", rounds=rounds):
            train(run)
    assert rows(tmp_path / "grown") == rows(tmp_path / "whole")
    for name in ("curves.csv", "movement.csv", "config.json"):
        assert (tmp_path / "grown" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_grew_and_was_killed_before_its_record_keeps_every_row(tmp_path, monkeypatch):
    for run in search(tmp_path / "whole", trials=1, controls=()):
        train(run)
    for run in search(tmp_path / "grown", trials=1, controls=(), rounds=1):
        train(run)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            list(map(train, search(tmp_path / "grown", trials=1, controls=())))
    for run in search(tmp_path / "grown", trials=1, controls=()):
        train(run)
    assert rows(tmp_path / "grown") == rows(tmp_path / "whole")
    assert (tmp_path / "grown" / "movement.csv").read_bytes() == (tmp_path / "whole" / "movement.csv").read_bytes()


def test_a_shorter_search_opened_before_the_folder_grew(tmp_path):
    short = search(tmp_path, trials=1, rounds=1, controls=())
    for run in search(tmp_path, trials=1, rounds=2, controls=()):
        train(run)
    for run in short:
        train(run)
    assert [row["level"] for row in rows(tmp_path)] == ["0", "1", "2"]


def test_a_whole_run_stays_whole_when_fewer_trials_are_asked_for(tmp_path):
    search(tmp_path, trials=2, config={"reduced": {}, "budget": None})
    search(tmp_path, trials=1, config={"reduced": {"trials": "1 of 2"}, "budget": "reduced budget"})
    found = json.loads((tmp_path / "config.json").read_text())
    assert (found["trials"], found["reduced"], found["budget"]) == (2, {}, None)
    search(tmp_path / "none", trials=2, config={"reduced": None})
    search(tmp_path / "none", trials=1, config={"reduced": None})


def test_fewer_rounds_leave_the_numbers_of_a_longer_run_alone(tmp_path):
    about = {"config": {"reduced": {"trials": "1 of 5", "rounds": "2 of 9"}}}
    search(tmp_path, trials=1, rounds=2, **about)
    search(tmp_path, trials=3, rounds=1, config={"reduced": {"trials": "3 of 5", "rounds": "1 of 9"}})
    found = json.loads((tmp_path / "config.json").read_text())
    assert (found["rounds"], found["trials"]) == (2, 3)
    assert found["reduced"] == {"trials": "3 of 5", "rounds": "2 of 9"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounds": -1}, "rounds"),
        ({"rounds": 1.5}, "rounds to be an int"),
        ({"trials": 0}, "trials"),
        ({"scope": "layers"}, "scope"),
        ({"criterion": "size"}, "criterion"),
        ({"controls": ("reset",)}, "controls"),
        ({"controls": ("small-dense",)}, "make_small"),
        ({"fractions": {"conv*": 0.2}}, "to match one of fc1.weight, fc2.weight"),
        ({"fractions": {"*.weight": 2}}, "at most 1"),
        ({"seed": -1}, "seed"),
        ({"init": "kaming"}, "kaming"),
    ],
)
def test_wrong_arguments_leave_no_folder(tmp_path, given, message):
    with pytest.raises(InitPerfError, match=message):
        search(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_model_without_prunable_layers_is_refused(tmp_path):
    with pytest.raises(InitPerfError, match="nn.Linear layers"):
        TicketSearch(lambda: nn.LayerNorm(3), rounds=1, out=tmp_path / "run")


def test_an_output_folder_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InitPerfError, match="can be written"):
        search(tmp_path / "file" / "run")


def test_logs_are_checked(tmp_path):
    for run in search(tmp_path):
        run.log(4, val_loss=1.0)
        with pytest.raises(InitPerfError, match="growing"):
            run.log(4, val_loss=1.0)
        break
    with pytest.raises(InitPerfError, match=r"run\.log"):
        for _ in search(tmp_path):
            pass


def test_a_diverged_network_is_named_and_its_level_not_kept(tmp_path):
    networks = iter(search(tmp_path))
    run = next(networks)
    run.log(1, val_loss=float("nan"))
    with torch.no_grad():
        run.model.fc1.weight[0, 0] = float("nan")
    with pytest.raises(InitPerfError, match="NaN"):
        next(networks)
    assert search(tmp_path).done == 0


class _Attention(nn.Module):
    """A convolution, an attention and linear layers: only the last can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.block(self.conv(x).transpose(1, 2)).mean(1))


def test_models_with_layers_that_cannot_be_pruned_are_searched_by_their_linear_layers(tmp_path):
    found = {}
    for run in TicketSearch(
        _Attention, rounds=1, fractions={"block.linear*": 0.5}, controls=["shuffle"], out=tmp_path / "run"
    ):
        run.model(torch.randn(4, 3, 5)).sum().backward()
        found[run.level, run.kind] = run.density, sorted(run.masks)
        run.log(1, val_loss=1.0)
    names = ["block.linear1.weight", "block.linear2.weight"]
    part = (128 + 16) / (256 + 16)  # 256 weights in the two layers, half of them pruned, 16 in the head
    assert found == {(0, "ticket"): (1.0, []), (1, "ticket"): (part, names), (1, "shuffle"): (part, names)}


def test_controls_as_a_string_are_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InitPerfError, match="controls as a list"):
        TicketSearch(lambda: nn.Linear(4, 4), rounds=1, controls="reinit", out=out)
    assert not out.exists()


def test_a_search_on_compressed_layers_finds_the_tickets_of_masked_ones(tmp_path):
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0).long()

    def make_model():
        return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2)).double()

    tickets = []
    for sparse in (False, True):
        out = tmp_path / str(sparse)
        search = TicketSearch(
            make_model,
            rounds=2,
            fractions=0.5,
            controls=("reinit", "shuffle"),
            trials=1,
            seed=0,
            out=out,
            sparse=sparse,
        )
        for run in search:
            optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
            for iteration in (1, 2, 3):
                loss = nn.functional.cross_entropy(run.model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(iteration, val_loss=loss.item())
            if run.level:
                assert type(run.model[0]).__name__ == ("SparseLinear" if sparse else "MaskedLinear")
        tickets.append([Ticket.load(out / "tickets" / f"trial0-level{level}.safetensors") for level in (1, 2)])
    for masked, compressed in zip(*tickets, strict=True):
        assert masked.sha256 == compressed.sha256
        assert all(torch.equal(mask, compressed.masks[name]) for name, mask in masked.masks.items())
