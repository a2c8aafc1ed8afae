"""Weight initialization, lottery tickets and layer variance for PyTorch: fast, and the same bits everywhere.

Exports are imported when first used, so that `initperf --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from initperf import init, prune
    from initperf.core.checks import InitPerfError
    from initperf.init.identify.identify import describe, describe_file
    from initperf.init.model.model import initialize
    from initperf.init.redirect import fast_init
    from initperf.layers.conv import MaskedConv2d, SparseConv2d
    from initperf.layers.convert import check_masks, densify, sparsify
    from initperf.layers.linear import MaskedLinear, SparseLinear
    from initperf.layers.optimizers import mask_optimizer_
    from initperf.layers.sequential import SparseSequential
    from initperf.tickets.search import TicketSearch
    from initperf.tickets.ticket import Ticket
    from initperf.variance.moments import moments
    from initperf.variance.monitor import VarianceMonitor
    from initperf.variance.verdicts import check_init

__version__ = "0.1.0"
__all__ = [
    "InitPerfError",
    "MaskedConv2d",
    "MaskedLinear",
    "SparseConv2d",
    "SparseLinear",
    "SparseSequential",
    "Ticket",
    "TicketSearch",
    "VarianceMonitor",
    "check_init",
    "check_masks",
    "densify",
    "describe",
    "describe_file",
    "fast_init",
    "init",
    "initialize",
    "mask_optimizer_",
    "moments",
    "prune",
    "sparsify",
]
_HOMES = {
    "InitPerfError": "core.checks",
    "MaskedConv2d": "layers.conv",
    "MaskedLinear": "layers.linear",
    "SparseConv2d": "layers.conv",
    "SparseLinear": "layers.linear",
    "SparseSequential": "layers.sequential",
    "Ticket": "tickets.ticket",
    "TicketSearch": "tickets.search",
    "VarianceMonitor": "variance.monitor",
    "check_init": "variance.verdicts",
    "check_masks": "layers.convert",
    "densify": "layers.convert",
    "describe": "init.identify.identify",
    "describe_file": "init.identify.identify",
    "fast_init": "init.redirect",
    "initialize": "init.model.model",
    "mask_optimizer_": "layers.optimizers",
    "moments": "variance.moments",
    "sparsify": "layers.convert",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'initperf' has no attribute {name!r}")
    if name not in _HOMES:
        return import_module(f"initperf.{name}")
    value = getattr(import_module(f"initperf.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
