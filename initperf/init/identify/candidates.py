"""Known initialization schemes as hypotheses about one tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from initperf.init.schemes import Init

_CUT_STD = 0.8796256610342398  # standard deviation of N(0, 1) cut at -2 and 2


class Candidate(NamedTuple):
    """A scheme's name, and the distribution it means for this tensor."""

    scheme: str
    init: Init


def _uniform(scheme: str, bound: float) -> Candidate:
    return Candidate(scheme, Init("uniform", (-bound, bound)))


def _normal(scheme: str, std: float) -> Candidate:
    return Candidate(scheme, Init("normal", (0.0, std)))


def _cut(scheme: str, std: float) -> Candidate:
    """Cut at two standard deviations, `std` being that of the uncut normal."""
    return Candidate(scheme, Init("trunc_normal", (0.0, std, -2 * std, 2 * std)))


_STDS = (0.02, 0.01, 1.0, 0.05, 0.1, 0.001, 0.002, 0.005, 0.006, 0.03, 0.04, 0.2, 0.5, 1e-6)
_GAINS = {"1/sqrt 2": math.sqrt(0.5), "5/3": 5 / 3, "sqrt 2": math.sqrt(2.0)}


class Surroundings(NamedTuple):
    """What the rest of the model tells about one tensor: layers in each of its lists, and the commonest width."""

    depths: tuple[int, ...]
    width: int


def candidates(name: str, shape: Sequence[int], fan: int | None, around: Surroundings) -> Iterator[Candidate]:
    """Schemes for a tensor of this name and shape, the likelier first. fan: fan-in of the weight that a bias belongs to."""
    if re.search(r"(weight|bias)_(ih|hh|hr)", name):
        yield from _recurrent(shape)
    if len(shape) >= 2:
        yield from _for_weights(shape)
    if fan:
        yield _uniform("torch default (1/sqrt fan_in)", 1 / math.sqrt(fan))
    for std in _STDS:
        yield _normal(f"normal({std:g})", std)
        yield _cut(f"trunc_normal({std:g}, cut at 2 std)", std)
    yield from _by_depth(name, around.depths)
    yield Candidate("uniform(0, 1)", Init("uniform", (0.0, 1.0)))
    for bound in (0.1, 0.05, 0.08, 0.01, 0.02, 1.0):
        yield _uniform(f"uniform({bound:g})", bound)
    if len(shape) >= 2:
        for text, gain in _GAINS.items():
            std = gain * _glorot(shape)
            yield _normal(f"xavier_normal, gain {text}", std)
            yield _uniform(f"xavier_uniform, gain {text}", math.sqrt(3) * std)
    yield from _by_width(shape, around)


def _by_depth(name: str, depths: Sequence[int]) -> Iterator[Candidate]:
    """Projections into a residual stream: by the model's depth (GPT-2), or by their own layer's number (BEiT)."""
    for std in (0.02, 0.01):
        for k in dict.fromkeys(k * depth for depth in depths for k in (2, 1)):
            if k > 1:
                yield _normal(f"normal({std:g} / sqrt({k})), residual projection", std / math.sqrt(k))
    for layer in dict.fromkeys(re.findall(r"(?<![^.])\d+(?![^.])", name)):
        k = 2 * (int(layer) + 1)
        yield _normal(f"normal(0.02 / sqrt({k})), residual projection of a layer", 0.02 / math.sqrt(k))


def _by_width(shape: Sequence[int], around: Surroundings) -> Iterator[Candidate]:
    """1 / sqrt of a width: the tensor's sizes, the model's width, and what T5 and CLIP make of them."""
    for size in dict.fromkeys((*shape, around.width)):
        if size > 1:
            yield _normal(f"normal(1/sqrt {size})", size**-0.5)
            yield _uniform(f"uniform(1/sqrt {size})", size**-0.5)
            yield _normal(f"normal(1/sqrt {2 * size})", (2 * size) ** -0.5)
            for depth in around.depths:
                text = f"normal(1/sqrt({size} * {2 * depth})), CLIP's projections"
                yield _normal(text, (2 * depth * size) ** -0.5)
    if len(shape) == 2:
        for heads in range(1, min(shape[0] // 8, 256) + 1):
            if shape[0] % heads == 0:
                head = shape[0] // heads
                yield _normal(f"normal(1/sqrt({shape[1]} * {head})), T5's queries", (shape[1] * head) ** -0.5)


def _recurrent(shape: Sequence[int]) -> Iterator[Candidate]:
    for gates, text in ((4, "4 gates"), (3, "3 gates"), (1, "no gates")):
        if shape[0] % gates == 0:
            yield _uniform(f"torch default (1/sqrt hidden, {text})", (shape[0] // gates) ** -0.5)


def _glorot(shape: Sequence[int]) -> float:
    return math.sqrt(2 / ((shape[0] + shape[1]) * math.prod(shape[2:])))


def _for_weights(shape: Sequence[int]) -> Iterator[Candidate]:
    field = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * field, shape[0] * field
    yield _uniform("torch default (kaiming_uniform, a=sqrt 5)", 1 / math.sqrt(fan_in))
    for mode, fan in (("", fan_in), (", fan_out", fan_out)):
        yield _normal(f"kaiming_normal{mode}", math.sqrt(2 / fan))
        yield _uniform(f"kaiming_uniform{mode}", math.sqrt(6 / fan))
    yield _normal("xavier_normal", _glorot(shape))
    yield _uniform("xavier_uniform", math.sqrt(3) * _glorot(shape))
    for mode, fan in (("", fan_in), (", fan_out", fan_out)):
        yield _normal(f"lecun_normal{mode}", fan**-0.5)
        yield _uniform(f"lecun_uniform{mode}", math.sqrt(3 / fan))
        yield _cut(f"lecun_normal{mode}, cut at 2 std", fan**-0.5 / _CUT_STD)
        yield _cut(f"kaiming_normal{mode}, cut at 2 std", math.sqrt(2 / fan) / _CUT_STD)
    yield _cut("xavier_normal, cut at 2 std", _glorot(shape) / _CUT_STD)
    if len(shape) > 2 and shape[1] == 1:
        yield _normal("kaiming_normal, fan_out of a group", math.sqrt(2 / field))
    if len(shape) == 2 and shape[0] % 3 == 0:
        yield _uniform("xavier_uniform, of three stacked", math.sqrt(6 / (shape[1] + shape[0] // 3)))
