"""Few rows times a packed sparse weight, y = x W^T + bias: the definition of the packing and of the product."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 8


class Packed(NamedTuple):
    """W (N, K) in groups of 8 survivors of one row; rows in `order`, most groups first, ties by row.

    values (G, 8); columns (G, 8): uint8 distances from the column in base (G,), or plain columns where base is None
    (uint16, int32 for K > 65536); start (N + 1,) int32: row order[r] has the groups start[r] to start[r + 1];
    order (N,) int32. Free places hold value 0 and column or distance 0.
    """

    values: Tensor
    columns: Tensor
    base: Tensor | None
    start: Tensor
    order: Tensor


def pack(weight: Tensor, mask: Tensor) -> Packed:
    """The survivors of weight (N, K), in the form that takes fewer bytes (8-bit distances if equal).

    Every 8 survivors of a row, columns ascending, make a group; in the 8-bit form it is cut wherever the distance from its
    first column passes a multiple of 256.
    """
    return min(_pack(weight, mask, True), _pack(weight, mask, False), key=packed_bytes)


def packed_bytes(packed: Packed) -> int:
    """What one product reads of the weight."""
    return sum(t.numel() * t.element_size() for t in packed if t is not None)


def _pack(weight: Tensor, mask: Tensor, byte_columns: bool) -> Packed:
    rows: list[list[list[int]]] = []
    for line in mask:
        columns = line.nonzero()[:, 0].tolist()
        groups: list[list[int]] = []
        for chunk in (columns[i : i + GROUP] for i in range(0, len(columns), GROUP)):
            buckets: dict[int, list[int]] = {}
            for c in chunk:
                buckets.setdefault((c - chunk[0]) // 256 if byte_columns else 0, []).append(c)
            groups += buckets.values()
        rows.append(groups)
    order = sorted(range(len(rows)), key=lambda r: -len(rows[r]))
    index = torch.uint16 if weight.shape[1] <= 1 << 16 else torch.int32
    start, values, distances, bases = [0], [], [], []
    for r in order:
        for group in rows[r]:
            free = GROUP - len(group)
            base = group[0] if byte_columns else 0
            values.append(torch.nn.functional.pad(weight[r, torch.tensor(group, device=weight.device)], (0, free)))
            distances.append([c - base for c in group] + [0] * free)
            bases.append(base)
        start.append(len(values))
    device = weight.device
    return Packed(
        torch.stack(values) if values else weight.new_empty(0, GROUP),
        torch.tensor(distances, dtype=torch.int32, device=device)
        .view(-1, GROUP)
        .to(torch.uint8 if byte_columns else index),
        torch.tensor(bases, dtype=torch.int32, device=device).to(index) if byte_columns else None,
        torch.tensor(start, dtype=torch.int32, device=device),
        torch.tensor(order, dtype=torch.int32, device=device),
    )


def unpack(packed: Packed, inputs: int) -> Tensor:
    """The dense weight (N, inputs)."""
    values, columns, base, start, order = packed
    places = columns.long() if base is None else columns.long() + base.long()[:, None]
    row = order.long().repeat_interleave(start.diff().long())
    flat = (row[:, None] * inputs + places).flatten()
    return values.new_zeros(order.numel() * inputs).index_add_(0, flat, values.flatten()).view(order.numel(), inputs)


def decode(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    base: Tensor | None,
    start: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    *,
    split: int | None = None,
) -> Tensor:
    """y (B, N) = x (B, K) W^T + bias, sums in float32 (float64 for float64), rounded once to x's dtype. `split` changes nothing here."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = unpack(Packed(values, columns, base, start, order), x.shape[1]).to(wide)
    y = x.to(wide) @ weight.t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
