"""Weight initialization, lottery tickets and layer variance for PyTorch: fast, and the same bits everywhere.

Exports are imported when first used, so that `initperf --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from initperf import init, prune
    from initperf.chain import SparseSequential
    from initperf.checks import InitPerfError
    from initperf.conv import MaskedConv2d, SparseConv2d
    from initperf.convert import check_masks, densify, sparsify
    from initperf.explain import describe, describe_file
    from initperf.masked import MaskedLinear
    from initperf.model_init import initialize
    from initperf.monitor import VarianceMonitor
    from initperf.optimizer_masks import mask_optimizer_
    from initperf.redirect import fast_init
    from initperf.search import TicketSearch
    from initperf.sparse import SparseLinear
    from initperf.stats import moments
    from initperf.ticket import Ticket
    from initperf.verdicts import check_init

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
    "InitPerfError": "checks",
    "MaskedConv2d": "conv",
    "MaskedLinear": "masked",
    "SparseConv2d": "conv",
    "SparseLinear": "sparse",
    "SparseSequential": "chain",
    "Ticket": "ticket",
    "TicketSearch": "search",
    "VarianceMonitor": "monitor",
    "check_init": "verdicts",
    "check_masks": "convert",
    "densify": "convert",
    "describe": "explain",
    "describe_file": "explain",
    "fast_init": "redirect",
    "initialize": "model_init",
    "mask_optimizer_": "optimizer_masks",
    "moments": "stats",
    "sparsify": "convert",
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
