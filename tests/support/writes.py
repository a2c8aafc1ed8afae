"""Ways to write a weight past its mask."""

from __future__ import annotations

import torch
from torch import nn


def normal(weight):
    nn.init.normal_(weight)


def a_row(weight):
    with torch.no_grad():
        weight[5] = 1.0


def one_value(weight):
    with torch.no_grad():
        weight.view(-1)[101] += 1.0


def noise(weight):
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))


def all_by_data(weight):
    weight.data.normal_()


def all_by_numpy(weight):
    weight.detach().numpy()[:] = 3.0


def other_memory(weight):
    weight.data = torch.randn(weight.shape)


def other_strides(weight):
    weight.data = torch.randn(weight.t().shape).t()


WRITES = [normal, a_row, one_value, noise, all_by_data, all_by_numpy, other_memory, other_strides]
