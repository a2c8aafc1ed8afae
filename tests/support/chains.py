"""Runs of small compressed layers, their dense twins, and calls in threads."""

from __future__ import annotations

import copy
import threading

import torch
from torch import nn

from initperf import SparseLinear, SparseSequential
from tolerance import assert_close_to_exact, of_network


def layer(inputs, outputs, density=0.2, bias=True, seed=0, dtype=torch.float32):
    mask = torch.rand(outputs, inputs, generator=torch.Generator().manual_seed(seed)) < density
    mask[0, 0] = True
    torch.manual_seed(seed)
    return SparseLinear(inputs, outputs, bias=bias, mask=mask, dtype=dtype)


def model(*widths, density=0.2, bias=True, last_relu=False, dtype=torch.float32):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [layer(a, b, density, bias, seed=i, dtype=dtype), nn.ReLU()]
    return SparseSequential(*layers[: None if last_relu else -1])


def dense_of(ours, dtype=None):
    """The dense network with copies of the parameters."""
    layers = [m.to_dense() if isinstance(m, SparseLinear) else copy.deepcopy(m) for m in ours]
    return nn.Sequential(*layers).to(dtype)


def assert_right(got, ours, x):
    """got is what the dense network makes of x, within rounding."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_zeros(0, x.shape[-1])
    (expected,) = of_network(dense_of(ours), rows)
    assert got.shape[:-1] == x.shape[:-1]
    assert_close_to_exact(got, expected.at(lambda t: t.reshape(got.shape)))


def in_threads(work):
    """work(number) in four threads at once."""
    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def with_threads(counts, call):
    """What call() gives with each of torch's numbers of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(call())
    finally:
        torch.set_num_threads(before)
    return found
