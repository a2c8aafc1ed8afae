"""Loggers and trainers' callbacks: what they write is what the monitor reads."""

import csv
import json
import math

import pytest
import torch
from torch import nn

from initperf.callbacks import hugging_face_callback, lightning_callback
from initperf.core.checks import InitPerfError
from initperf.loggers import CallbackLogger, FileLogger, TensorBoardLogger
from initperf.variance.monitor import VarianceMonitor


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def train(monitor: VarianceMonitor, steps: int, each=lambda: None) -> None:
    optimizer = torch.optim.SGD(monitor.model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        monitor.model(torch.randn(32, 8)).square().mean().backward()
        monitor.step()
        optimizer.step()
        each()


def of(monitor: VarianceMonitor) -> dict[tuple[int, str, str], float]:
    return {(s, n, key): v for s, n, row in monitor.rows() for key, v in row.items()}


def same(got: dict, want: dict) -> bool:
    return got.keys() == want.keys() and all(got[k] == v or math.isnan(v) for k, v in want.items())


@pytest.mark.parametrize("every", [1, 3])
def test_a_csv_file_holds_every_reading_once_however_often_it_is_asked_for(tmp_path, every):
    path = tmp_path / "out.csv"
    with VarianceMonitor(mlp(), every=every) as monitor, FileLogger(monitor, path) as logger:
        train(monitor, 12, logger.log)
    with path.open() as file:
        lines = [(int(r["step"]), r["layer"], r["statistic"], float(r["value"])) for r in csv.DictReader(file)]
    assert len({line[:3] for line in lines}) == len(lines)
    assert same({line[:3]: line[3] for line in lines}, of(monitor))
    assert any(line[2] == "weight_update_ratio" for line in lines)


def test_a_jsonl_file_is_appended_to_in_whole_lines_of_strict_json(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"before": 1}\n')
    model = mlp()
    model[0].weight.data.fill_(math.inf)
    with VarianceMonitor(model) as monitor, FileLogger(monitor, path) as logger:
        train(monitor, 3, logger.log)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    first, *lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert first == {"before": 1}
    assert {(line["step"], line["layer"]) for line in lines} == {(s, n) for s in range(3) for n in ("0", "2")}
    assert lines[0]["forward_var"] is None


def test_a_plain_callback_gets_a_flat_dict_a_step():
    got = []
    with (
        VarianceMonitor(mlp(), history=2) as monitor,
        CallbackLogger(monitor, lambda step, scalars: got.append((step, scalars))),
    ):
        train(monitor, 5)
    assert [step for step, _ in got] == [3, 4]
    assert all(isinstance(v, float) for _, scalars in got for v in scalars.values())
    assert "0/forward_var" in got[0][1]


def test_tensorboard_reads_back_what_was_measured(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with (
        SummaryWriter(str(tmp_path)) as writer,
        VarianceMonitor(mlp()) as monitor,
        TensorBoardLogger(monitor, writer),
    ):
        train(monitor, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    want = [row["forward_var"] for _, name, row in monitor.rows() if name == "0"]
    got = events.Scalars("initperf/0/forward_var")
    assert [e.step for e in got] == [0, 1, 2, 3]
    assert [e.value for e in got] == pytest.approx(want, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_trainer_logs_the_monitor(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = lightning_callback(log_every=2)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(64, 8)), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=CSVLogger(str(tmp_path)),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), data)
    assert callback.monitor.steps == 4
    assert callback.monitor.closed
    [file] = tmp_path.rglob("metrics.csv")
    header, *lines = file.read_text().splitlines()
    assert "net.0/forward_var" in header.split(",")
    assert lines


@pytest.mark.filterwarnings("ignore")
def test_in_lightning_accumulated_batches_read_as_one(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, _):
            return self.net(batch[0]).square().mean()

        def validation_step(self, batch, _):
            return self.net(100 * batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data, got = torch.utils.data.TensorDataset(torch.randn(64, 8)), []
    for parts in (1, 4):
        callback = lightning_callback()
        loader = torch.utils.data.DataLoader(data, batch_size=64 // parts)
        trainer = lightning.Trainer(
            max_epochs=2,
            accumulate_grad_batches=parts,
            accelerator="cpu",
            callbacks=[callback],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(Module(), loader, loader)
        assert callback.monitor.steps == 2
        got.append(callback.monitor.scalars())
    for key in ("net.0/forward_var", "net.0/backward_var", "net.2/weight_grad_var"):
        assert got[1][key] == pytest.approx(got[0][key], rel=1e-4)
    assert got[0]["net.0/forward_var"] < 10


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_trainer_logs_the_monitor(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x, labels=None):
            out = self.net(x)
            return {"loss": nn.functional.cross_entropy(out, labels), "logits": out}

    class See(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    data = [{"x": torch.randn(8), "labels": i % 2} for i in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=8,
        logging_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    callback = hugging_face_callback()
    transformers.Trainer(Net(), arguments, train_dataset=data, callbacks=[callback, See()]).train()
    assert callback.monitor.steps == 6
    assert callback.monitor.closed
    assert [("initperf/net.0/forward_var" in logs) for logs in seen[:3]] == [True] * 3


def test_hugging_face_float16_training_has_its_scale_taken_out():
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    model, scaler, callback = mlp(), torch.amp.GradScaler("cpu", init_scale=1024.0), hugging_face_callback()
    optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), 0.1), scaler=scaler)
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    assert callback.monitor.scaler is scaler


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: FileLogger(m, "out.txt"), "csv"),
        (lambda m: FileLogger(m, "/nowhere/at/all/out.csv"), "folder"),
        (lambda m: FileLogger(3, "out.csv"), "VarianceMonitor"),
        (lambda m: CallbackLogger(m, 3), "callable"),
        (lambda m: TensorBoardLogger(m, 3), "SummaryWriter"),
    ],
)
def test_misuse_is_named(wrong, message):
    with pytest.raises(InitPerfError, match=message):
        wrong(VarianceMonitor(mlp()))
