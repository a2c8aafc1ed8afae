"""Where a monitor's readings go: TensorBoard, a CSV or JSONL file, or any function of a step and a flat dict."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from initperf.core.checks import InitPerfTypeError, check, fail
from initperf.variance.monitor import Row, VarianceMonitor

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

COLUMNS = ("step", "layer", "statistic", "value")


class Logger:
    """`log()` writes the measured steps that were not written before; call it as seldom as the device should be waited for.

    Steps that left the monitor's ring buffer unread are lost: call it at least every `history` measured steps. The last
    step is held back until the next one is over, since its update is only measured then; `log(last=True)` writes it too.
    """

    def __init__(self, monitor: VarianceMonitor) -> None:
        if not isinstance(monitor, VarianceMonitor):
            fail("monitor to be a VarianceMonitor", type(monitor).__name__, kind=InitPerfTypeError)
        self.monitor = monitor
        self._next = 0

    def log(self, last: bool = False) -> int:
        """Write what is new; returns the number of steps."""
        end = self.monitor.steps - (0 if last else 1)
        steps: dict[int, dict[str, Row]] = {}
        for step, layer, row in self.monitor.rows(self._next):
            if step < end:
                steps.setdefault(step, {})[layer] = row
        self._write(steps)
        self._next = max(steps, default=self._next - 1) + 1
        return len(steps)

    def _write(self, steps: dict[int, dict[str, Row]]) -> None:
        raise NotImplementedError

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.log(last=True)


class CallbackLogger(Logger):
    """Calls function(step, {"layer/statistic": value}), as wandb.log or mlflow.log_metrics are made to take."""

    def __init__(self, monitor: VarianceMonitor, function: Callable[[int, Row], Any]) -> None:
        super().__init__(monitor)
        if not callable(function):
            fail("function to be callable", type(function).__name__, kind=InitPerfTypeError)
        self.function = function

    def _write(self, steps: dict[int, dict[str, Row]]) -> None:
        for step, layers in steps.items():
            flat = {f"{n or 'model'}/{key}": value for n, row in layers.items() for key, value in row.items()}
            self.function(step, flat)


class TensorBoardLogger(CallbackLogger):
    """Writes scalars with a torch.utils.tensorboard.SummaryWriter, under `prefix`."""

    def __init__(self, monitor: VarianceMonitor, writer: SummaryWriter, prefix: str = "initperf/") -> None:
        if not hasattr(writer, "add_scalar"):
            kind = InitPerfTypeError
            fail("writer to be a SummaryWriter", type(writer).__name__, kind=kind)

        def add(step: int, scalars: Row) -> None:
            for name, value in scalars.items():
                writer.add_scalar(prefix + name, value, step)

        super().__init__(monitor, add)


class FileLogger(Logger):
    """Appends whole lines to a .csv (step, layer, statistic, value) or .jsonl file (an object a step and layer).

    All lines of a call go in one write, so that a reader or a second process never sees half a line. In JSON, NaN and
    infinities are null.
    """

    def __init__(self, monitor: VarianceMonitor, path: str | os.PathLike[str]) -> None:
        super().__init__(monitor)
        self.path = Path(path)
        check(self.path.suffix in (".csv", ".jsonl"), "a path that ends in .csv or .jsonl", str(path))
        check(self.path.parent.is_dir(), "a path in a folder that exists", str(path))

    def _write(self, steps: dict[int, dict[str, Row]]) -> None:
        rows = [(step, layer, row) for step, layers in steps.items() for layer, row in layers.items()]
        if not rows:
            return
        if self.path.suffix == ".csv":
            lines: list[tuple[object, ...]] = [(s, n, key, v) for s, n, row in rows for key, v in row.items()]
            new = not self.path.exists() or not self.path.stat().st_size
            text = _csv([COLUMNS, *lines] if new else lines)
        else:
            text = "".join(json.dumps({"step": s, "layer": n} | _finite(row)) + "\n" for s, n, row in rows)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, text.encode())
        finally:
            os.close(file)


def _csv(lines: list[tuple[object, ...]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _finite(row: Row) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in row.items()}
