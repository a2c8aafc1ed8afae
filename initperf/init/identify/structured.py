"""Tensors that are no sample of independent values: constants, identities, orthogonal matrices, tables of sinusoids, repeated rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from initperf.init.identify.fit import MATRIX
from initperf.variance.moments import Moments


def structured(tensor: Tensor, found: Moments) -> tuple[str, str] | None:
    """Constants, identities and orthogonal matrices: what is no distribution of independent values."""
    low, high = float(found.min), float(found.max)
    if low == high:
        names = {0.0: "zeros", 1.0: "ones"}
        return names.get(low, f"constant({low:g})"), f"all {tensor.numel()} values are {low:g}"
    if tensor.dim() < 2:
        return None
    matrix = tensor.reshape(tensor.shape[0], -1)
    if low == 0 and high == 1 and int(found.count * (1 - found.zeros) + 0.5) <= max(matrix.shape):
        if tensor.dim() == 2 and torch.equal(
            tensor, torch.eye(*tensor.shape, dtype=tensor.dtype, device=tensor.device)
        ):
            return "eye", "the identity"
        if tensor.dim() in (3, 4, 5) and torch.equal(tensor, nn.init.dirac_(torch.empty_like(tensor))):
            return "dirac", "the identity of a convolution"
    if len(matrix) > 2 and torch.equal(matrix, matrix[:1].expand_as(matrix)):
        return (
            "equal rows",
            f"{len(matrix)} rows are the same: {', '.join(f'{x:.3g}' for x in matrix[0, :4].tolist())}, ...",
        )
    if _is_table_of_sinusoids(tensor):
        return "sinusoids", "every column is a sinusoid of the row's number"
    gain = _orthogonal_gain(matrix)
    if gain is not None:
        scaled = "" if abs(gain - 1) < 1e-3 else f" (gain {gain:.4g})"
        return f"orthogonal{scaled}", "its rows or columns are orthogonal, and of one length"
    return None


def _orthogonal_gain(matrix: Tensor) -> float | None:
    """g if matrix matrix' (or matrix' matrix) is g^2 times the identity within rounding. Tried on 64 rows first.

    Rounding n entries of size g / sqrt(n) by eps / 2 each moves a product of two rows by about 0.4 eps g^2 / sqrt(n), of
    which 20 times is allowed; between independent values the product is about g^2 / sqrt(n), 1 / (8 eps) times more. The QR adds some float32 eps.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    k = wide.shape[0]
    if k < 2 or wide.shape[1] < 4:
        return None
    allowed = 8 * torch.finfo(matrix.dtype).eps / math.sqrt(wide.shape[1]) + 64 * torch.finfo(torch.float32).eps
    for rows in (wide[:64], wide):
        if rows.numel() > MATRIX:
            break
        x = rows.double()
        gram = x @ x.t()
        square = float(gram.diagonal().mean())
        off = gram - square * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        if not square > 0 or float(off.abs().max()) / square > allowed:
            return None
    return math.sqrt(square)


def _is_table_of_sinusoids(tensor: Tensor) -> bool:
    """Positional encodings (Vaswani et al. 2017): x[t + 1] + x[t - 1] = 2 cos(w) x[t] in each column, within rounding of its values."""
    table = tensor.squeeze(0) if tensor.dim() == 3 else tensor
    if table.dim() != 2 or len(table) < 8:
        return False
    table = table[:1000]
    table = table[1:] if not table[0].any() else table
    x = table.double()
    middle, sides = x[1:-1], x[2:] + x[:-2]
    cosine = (middle * sides).sum(0) / middle.square().sum(0).clamp(min=1e-300)
    error = (sides - cosine * middle).abs().max()
    return bool(error <= 16 * max(torch.finfo(tensor.dtype).eps, 1e-5) * x.abs().max())
