"""The host's side of the RNG contract: words, streams, seeds, and the constants of distributions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initperf import rng
from initperf.core.checks import InitPerfError
from initperf.rng import contract
from known_answers import KNOWN

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_random123_known_answers(counter, key, words):
    assert rng.philox(counter, key) == words


def test_streams_of_names_differ_and_do_not_change():
    assert rng.stream_of("0.weight") == 0xC7C2CADAE2E5685F  # sha256sum of the name, first 8 bytes
    names = [f"layers.{i}.{kind}" for i in range(500) for kind in ("weight", "bias")]
    assert len({rng.stream_of(name) for name in names}) == len(names)
    assert all(0 <= rng.stream_of(name) < 2**64 for name in names)


@pytest.mark.parametrize(
    "wrapped",
    [
        "module.block.0.weight",
        "_orig_mod.block.0.weight",
        "module._orig_mod.block.0.weight",
        "_fsdp_wrapped_module.block._fsdp_wrapped_module.0.weight",
        "block._checkpoint_wrapped_module.0.weight",
        "block.0.parametrizations.weight.original",
        "block.0.weight_orig",
        "block.0.weight_values",
    ],
)
def test_what_wrappers_add_to_a_name_does_not_change_its_stream(wrapped):
    assert rng.canonical_name(wrapped) == "block.0.weight"
    assert rng.stream_of(wrapped) == rng.stream_of("block.0.weight")


def test_seeds_come_from_the_generator_and_follow_manual_seed():
    torch.manual_seed(5)
    first, second = rng.draw_seed(), rng.draw_seed()
    assert first != second
    torch.manual_seed(5)
    assert rng.draw_seed() == first
    assert rng.draw_seed(torch.Generator().manual_seed(5)) == first
    assert 0 <= first < 2**64


class FakeCudaGenerator:
    """What draw_seed uses of a CUDA generator; it has no other attribute, so anything that would wait for the device fails."""

    device = torch.device("cuda")

    def __init__(self, seed: int, offset: int = 0) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


def test_a_cuda_generator_gives_seed_and_offset_and_advances():
    generator = FakeCudaGenerator(123)
    seeds = [rng.draw_seed(generator) for _ in range(100)]
    assert generator.offset == 400
    assert len(set(seeds)) == 100
    assert [rng.draw_seed(FakeCudaGenerator(123, 4 * i)) for i in range(100)] == seeds
    low, high, _, _ = rng.philox((4, 0, 0, 0), (123, 0))
    assert seeds[1] == high << 32 | low
    assert rng.draw_seed(FakeCudaGenerator(-1)) == rng.draw_seed(FakeCudaGenerator(2**64 - 1))


@pytest.mark.parametrize("dtype", FLOATS)
@settings(deadline=None, max_examples=60)
@given(x=st.floats(-1e4, 1e4))
def test_neighbours_in_a_dtype_enclose_the_number(dtype, x):
    below, above = contract.at_most(x, dtype), contract.at_least(x, dtype)
    assert below <= x <= above
    for value in (below, above):
        assert torch.tensor(value, dtype=dtype).item() == value
    if below != x:
        assert torch.nextafter(torch.tensor(below, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item() == above


@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_bounds_are_the_nearest_values_inside(dtype):
    _, _, least, greatest = rng.uniform(0.1, 1.0, dtype).params
    one = torch.tensor(1.0, dtype=dtype)
    assert greatest == torch.nextafter(one, torch.zeros_like(one)).item()
    assert 0.1 <= least <= 0.1 * (1 + torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "call",
    [
        lambda: rng.uniform(1.0, 0.0, torch.float32),
        lambda: rng.uniform(math.nan, 1.0, torch.float32),
        lambda: rng.uniform(0.0, math.inf, torch.float32),
        lambda: rng.uniform(-3e38, 3e38, torch.float32),
        lambda: (
            rng.uniform(1.0, math.nextafter(1.0, 2.0), torch.float64) and rng.uniform(1.0001, 1.0002, torch.bfloat16)
        ),
        lambda: rng.uniform(0.0, 1.0, torch.int64),
        lambda: rng.normal(0.0, -1.0),
        lambda: rng.normal(math.nan, 1.0),
        lambda: rng.normal(0.0, math.inf),
        lambda: rng.normal(1e39, 1.0),
        lambda: rng.trunc_normal(0.0, -1.0, -2.0, 2.0, torch.float32),
        lambda: rng.trunc_normal(0.0, 0.0, -2.0, 2.0, torch.float32),
        lambda: rng.trunc_normal(0.0, 1.0, 2.0, -2.0, torch.float32),
        lambda: rng.trunc_normal(0.0, 1.0, math.nan, 2.0, torch.float32),
        lambda: rng.trunc_normal(0.0, math.nan, -2.0, 2.0, torch.float32),
        lambda: rng.trunc_normal(0.0, 1.0, math.inf, math.inf, torch.float32),
        lambda: rng.trunc_normal(0.0, 1.0, 1.0001, 1.0002, torch.bfloat16),
    ],
)
def test_impossible_distributions_are_refused(call):
    with pytest.raises(InitPerfError, match=r"Expected .* Got "):
        call()


def test_a_truncation_beyond_the_reach_of_normal_is_normal():
    assert rng.trunc_normal(0.0, 0.02, -2.0, 2.0, torch.float32) == rng.normal(0.0, 0.02)
    assert rng.trunc_normal(1.0, 2.0, -math.inf, math.inf, torch.float16) == rng.normal(1.0, 2.0)
    assert rng.trunc_normal(0.0, 1.0, -6.0, 7.0, torch.float32).kind != rng.NORMAL


@settings(deadline=None, max_examples=60)
@given(st.floats(-50, 50), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3), st.floats(1e-2, 1e3))
def test_mirrored_truncations_have_mirrored_constants(mean, std, a, width):
    left = rng.trunc_normal(mean, std, a, a + width, torch.float64)
    right = rng.trunc_normal(-mean, std, -a - width, -a, torch.float64)
    assert left.kind == right.kind
    assert left.params[2] == -right.params[3]
    if left.kind in (rng.TRUNC_TAIL, rng.TRUNC_FAR):
        assert left.params[0] == -right.params[0]
        assert left.params[4:] == right.params[4:]
