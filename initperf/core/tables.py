"""A table for people, and numbers as words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

NONE = "–"


class Table(NamedTuple):
    """Text cells; a new group begins where the first cell is not empty; `notes` stand below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def percent(fraction: float, digits: int | None = None) -> str:
    """0.0423 -> "4.23%" (three significant digits), or with a fixed number of decimals."""
    return f"{100 * fraction:.3g}%" if digits is None else f"{100 * fraction:.{digits}f}%"


def joined(words: Iterable[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def count_of(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def size(count: float) -> str:
    """Bytes, in decimal units."""
    for unit, scale in (("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"
