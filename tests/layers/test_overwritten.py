"""A weight that is written past its mask, in any way: the layer multiplies by the mask all the same."""

import pytest
import torch
from torch.nn import functional as F

from initperf import MaskedConv2d, MaskedLinear
from initperf.core.bits import pack_bits
from initperf.core.checks import InitPerfError
from initperf.layers.base.pattern import SparsePattern
from tolerance import assert_close_to_exact, linear, sums
from writes import WRITES, a_row, all_by_data, one_value

ROWS = (1, 3, 16, 40, 300)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_the_mask_counts_at_every_batch_size(write, gradients):
    mask = torch.rand(96, 160, generator=torch.Generator().manual_seed(0)) < 0.1
    mask.view(-1)[101] = False
    layer = MaskedLinear(160, 96, mask=mask)
    for rows in ROWS:
        x = torch.randn(rows, 160)
        with torch.set_grad_enabled(gradients):
            layer(x)
            write(layer.weight)
            written = layer.weight.detach().clone()
            assert_close_to_exact(layer(x), linear(x, written * mask, layer.bias))
        assert not layer.weight[~mask].any()
        assert torch.equal(layer.weight[mask], written[mask])


@pytest.mark.parametrize("write", [a_row, one_value, all_by_data])
def test_a_convolution_too(write):
    mask = torch.rand(8, 3, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    mask.view(-1)[101] = False
    layer, x = MaskedConv2d(3, 8, (3, 5), mask=mask), torch.randn(2, 3, 9, 9)
    layer(x)
    write(layer.weight)
    expected = sums(F.conv2d, x, layer.weight.detach() * mask) + layer.bias.detach().view(-1, 1, 1)
    assert_close_to_exact(layer(x), expected)
    assert not layer.weight[~mask].any()


def test_memory_of_another_shape_raises():
    layer = MaskedLinear(64, 64, mask=torch.rand(64, 64) < 0.5)
    layer.weight.data = torch.randn(3, 4)
    with pytest.raises(InitPerfError, match=r"weight of the mask's shape \(64, 64\). Got \(3, 4\)"):
        layer(torch.randn(5, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 16), (33, 70), (600, 517)])
def test_every_pruned_value_is_seen_and_no_other(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[-1, -1] = False
    pattern = SparsePattern(mask)
    weight = torch.randn(shape, generator=generator).to(dtype).masked_fill(~mask, -0.0)
    assert torch.equal(pattern._content, pack_bits(mask))
    assert not pattern.is_broken_by(weight)
    places = (~mask).flatten().nonzero().flatten()
    chosen = torch.randint(len(places), (30,), generator=generator)
    for place in (places[0], places[-1], *places[chosen]):
        broken = weight.clone()
        broken.view(-1)[place] = torch.finfo(dtype).smallest_normal
        assert pattern.is_broken_by(broken)
    assert pattern.is_broken_by(broken.t().contiguous().t())
