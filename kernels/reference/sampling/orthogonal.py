"""orthogonal_: QR by blocked Householder reflections in one fixed order, in plain torch. Every line is an elementwise operation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

PANEL = 64  # reflectors applied together; part of the definition, since it decides the order of operations


def _products(v: Tensor, m: Tensor, start: int) -> Tensor:
    """v' m over the rows from `start` on, each sum in rising order."""
    total = m.new_zeros(v.shape[1], m.shape[1])
    for i in range(start, m.shape[0]):
        total = total + v[i][:, None] * m[i]
    return total


def _factor(m: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The columns of m become reflectors, each zero above its own row; returns tau and the sign of R's diagonal."""
    width = m.shape[1]
    tau, sign = m.new_zeros(width), m.new_zeros(width)
    for k in range(width):
        row = start + k
        g = _products(m[:, k : k + 1], m, row)[0]
        norm = m.new_tensor(math.sqrt(float(g[k])))  # torch.sqrt goes through MKL and is not always correctly rounded
        head = m[row, k].clone()
        sign[k] = -1 if head >= 0 else 1
        shift = sign[k] * norm
        square = norm * (norm + head.abs())
        tau[k] = 1 / square if square > 0 else 0
        g = (g - shift * m[row]) * tau[k]
        g[: k + 1] = 0
        m[row, k] = head - shift
        m[row:] -= m[row:, k : k + 1] * g
    for k in range(width):
        m[: start + k, k] = 0
    return tau, sign


def _triangle(v: Tensor, tau: Tensor, start: int) -> Tensor:
    """T of I - V T V' (upper triangular), from the products of the reflectors with one another."""
    gram = _products(v, v, start)
    t = torch.diag(tau)
    for j in range(1, len(tau)):
        total = t[:j, 0] * gram[0, j]
        for k in range(1, j):  # t is zero left of its diagonal
            total = total + t[:j, k] * gram[k, j]
        t[:j, j] = -tau[j] * total
    return t


def _reflect(v: Tensor, t: Tensor, m: Tensor, start: int) -> None:
    """m -= v t (v' m), reflector by reflector."""
    w = _products(t.t(), _products(v, m, start), 0)
    for p in range(v.shape[1]):
        m[start:] -= v[start:, p : p + 1] * w[p]


def orthogonal_(matrix: Tensor) -> Tensor:
    """Replace `matrix` (m, n), m >= n, contiguous float32 or float64, by the Q of its QR decomposition whose R has a positive diagonal."""
    m, n = matrix.shape
    panels = []
    for first in range(0, n, PANEL):
        v = matrix[:, first : first + PANEL]
        tau, sign = _factor(v, first)
        t = _triangle(v, tau, first)
        _reflect(v, t.t(), matrix[:, first + PANEL :], first)
        panels.append((first, v, t, sign))
    q = torch.eye(m, n, dtype=matrix.dtype, device=matrix.device)
    for first, v, t, _ in reversed(panels):
        _reflect(v, t, q[:, first:], first)
    return matrix.copy_(q * torch.cat([sign for *_, sign in panels]))
