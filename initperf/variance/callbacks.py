"""VarianceMonitor in trainers: a Lightning callback and a Hugging Face TrainerCallback. Neither package is imported before use."""

from __future__ import annotations

from typing import Any

from initperf.core.checks import InitPerfImportError, fail
from initperf.variance.monitor import VarianceMonitor


def lightning_callback(*, log_every: int = 50, **settings: Any) -> Any:
    """A lightning.pytorch (or pytorch_lightning) Callback that watches the trained module and logs to the trainer's loggers.

    settings: VarianceMonitor's. Readings are logged every `log_every` optimizer steps and when training ends. The monitor
    is its attribute `monitor`, which can be read after training.
    """
    Callback: Any
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            fail("lightning or pytorch_lightning to be installed", "neither", kind=InitPerfImportError)

    class VarianceCallback(Callback):
        monitor: VarianceMonitor | None = None

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            plugin = getattr(trainer, "precision_plugin", None)
            own: dict[str, Any] = {"scaler": getattr(plugin, "scaler", None)}
            self.monitor = VarianceMonitor(pl_module, **(own | settings)).attach()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            assert self.monitor is not None
            self.monitor.step()
            if self.monitor.steps % log_every == 0:
                self._log(trainer)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._end(trainer)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            self._end(trainer)

        def _log(self, trainer: Any) -> None:
            assert self.monitor is not None
            scalars = self.monitor.scalars()
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=trainer.global_step)

        def _end(self, trainer: Any) -> None:
            if self.monitor is not None and not self.monitor.closed:
                if self.monitor.steps:
                    self._log(trainer)
                self.monitor.close()

    return VarianceCallback()


def hugging_face_callback(**settings: Any) -> Any:
    """A transformers TrainerCallback that watches the trained model; readings join what the Trainer logs (logging_steps).

    settings: VarianceMonitor's. Parameters' gradients are those after clipping. The monitor is its attribute `monitor`, which can
    be read after training.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        fail("transformers to be installed", "an installation without", kind=InitPerfImportError)

    class VarianceCallback(TrainerCallback):
        monitor: VarianceMonitor | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            optimizer = kwargs.get("optimizer")  # accelerate's wrapper, which knows the scaler of float16
            own: dict[str, Any] = {"scaler": getattr(optimizer, "scaler", None)}
            self.monitor = VarianceMonitor(model, **(own | settings)).attach()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.monitor is not None
            self.monitor.step()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.monitor is not None:
                self.monitor.close()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None and self.monitor is not None and self.monitor.steps:
                logs |= _prefixed(self.monitor)

    return VarianceCallback()


def _prefixed(monitor: VarianceMonitor) -> dict[str, float]:
    return {f"initperf/{key}": value for key, value in monitor.scalars().items()}
