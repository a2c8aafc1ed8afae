"""Cases of initialization: what the public functions of initperf.init launch for tensors on a GPU, in all dtypes and kinds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from initperf import SparseLinear, init, ops, rng
from initperf.kernels.gpu import targets
from initperf.kernels.gpu.sampling import sample, sample_many
from tools.gpu_report.case import BF16, F16, F32, F64, SHORT, Case, replaced

DTYPES = (F32, BF16, F16, F64)
# One entry a kind at least, and every function of initperf.init that samples on a tensor's device.
FUNCTIONS: dict[str, Callable[[Tensor], object]] = {
    "uniform_": lambda t: init.uniform_(t, -1.0, 1.0, seed=1),
    "normal_": lambda t: init.normal_(t, 0.0, 0.02, seed=1),
    "trunc_normal_ of 2": lambda t: init.trunc_normal_(t, 0.0, 1.0, -2.0, 2.0, seed=1),
    "trunc_normal_ of 3": lambda t: init.trunc_normal_(t, 0.0, 1.0, -3.0, 3.0, seed=1),
    "trunc_normal_ of a tail": lambda t: init.trunc_normal_(t, 0.0, 1.0, 4.0, 5.0, seed=1),
    "trunc_normal_ far out": lambda t: init.trunc_normal_(t, 0.0, 1.0, 20.0, 21.0, seed=1),
    "trunc_normal_ narrow": lambda t: init.trunc_normal_(t, 0.0, 1.0, 1.0, 1.01, seed=1),
}
OTHERS: dict[str, Callable[[Tensor], object]] = {
    "kaiming_uniform_": lambda t: init.kaiming_uniform_(t, seed=1),
    "kaiming_normal_": lambda t: init.kaiming_normal_(t, seed=1),
    "xavier_uniform_": lambda t: init.xavier_uniform_(t, seed=1),
    "xavier_normal_": lambda t: init.xavier_normal_(t, seed=1),
    "sparse_": lambda t: init.sparse_(t, 0.5, seed=1),
    "sample_into": lambda t: init.sample_into(t, rng.normal(0.0, 1.0), seed=1),
}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors go where CUDA tensors go: to the launchers of Triton's kernels."""
    original = ops.implementation
    warp = 2 if targets.arch().startswith("gfx") else 1
    with (
        replaced(ops, implementation=lambda name, device: original(name, "cuda")),
        replaced(sample, _WARP=warp),
        replaced(sample_many, _WARP=warp),
    ):
        yield


def _case(label: str, call: Callable[[], object], store_bits: int = 128, tested: tuple[str, ...] = ("sm_90",)) -> Case:
    def run() -> object:
        with as_on_a_gpu():
            return call()

    return Case("init", label, run, tested=tested, load_bits=0, store_bits=store_bits, load_share=0.0, contract=True)


def _model() -> nn.Module:
    """Weights of several dtypes and distributions, a mask, and survivors alone."""
    model = nn.Sequential(
        nn.Embedding(8, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Conv2d(4, 4, 3)
    )
    model[3].to(BF16)
    mask = torch.arange(64 * 64).view(64, 64) % 3 == 0
    return model.append(SparseLinear.from_linear(nn.Linear(64, 64), mask))


def _initialize(**options: Any) -> object:
    masks = {"1.weight": torch.arange(64 * 64).view(64, 64) % 2 == 0}
    return init.initialize(_model(), seed=1, masks=masks, rules={"0.weight": "trunc_normal"}, **options)


def init_cases() -> list[Case]:
    """Functions on whole tiles in every dtype; a size that fills no program; shards; survivors; a model."""
    result = [
        _case(f"{name} {SHORT[dtype]}", lambda call=call, dtype=dtype: call(torch.empty(64, 128, dtype=dtype)))
        for name, call in FUNCTIONS.items()
        for dtype in DTYPES
    ]
    result += [_case(name, lambda call=call: call(torch.empty(64, 128))) for name, call in OTHERS.items()]
    normal = rng.normal(0.0, 1.0)
    for dtype in DTYPES:
        odd = torch.empty(7, 9, dtype=dtype)
        narrow = 8 * dtype.itemsize
        result.append(_case(f"normal_ {SHORT[dtype]}, odd size", lambda t=odd: init.normal_(t, seed=1), narrow))
        result.append(
            _case(
                f"sample_shard_into {SHORT[dtype]}, columns",
                lambda t=odd: init.sample_shard_into(t, normal, (7, 90), (0, 18), seed=1),
                narrow,
            )
        )
    mask = torch.arange(640).view(10, 64) % 2 == 0
    result.append(
        _case(
            "sample_survivors_into",
            lambda: init.sample_survivors_into(torch.empty(320), normal, mask, mask.shape, seed=1),
            tested=(),
        )
    )
    result.append(_case("initialize", _initialize, tested=()))
    result.append(_case("initialize with stats", lambda: _initialize(stats=True), tested=("sm_90",)))
    return result
