"""Inference on survivors kept in the kernels' order: the same products, and every write to the weight counts at the next call."""

import copy
import mmap
import os
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from initperf import MaskedLinear, SparseLinear, choice, densify, ops
from initperf.core.bits import pack_bits
from initperf.kernels.cpu.sparse import few_rows, many_rows
from initperf.kernels.cpu.sparse.compressed_index import sparse_tensors
from initperf.kernels.cpu.sparse.index import pattern_tensors
from initperf.layers.inference import ordered_copy
from initperf.layers.inference.write_watch import why_not
from tolerance import assert_close_to_exact, bits, linear, product
from writes import WRITES

KINDS = [MaskedLinear, SparseLinear]
watches = pytest.mark.skipif(bool(why_not()), reason=f"nothing can be watched here: {why_not()}")


@pytest.fixture(autouse=True)
def for_small_layers(monkeypatch):
    """Layers of any size keep their survivors, at any density."""
    monkeypatch.setattr(ordered_copy, "LEAST", 1)
    monkeypatch.setattr(choice, "kept_pays", lambda *_: True)


def made(kind, outputs=100, inputs=300, density=0.2, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    mask = torch.rand(outputs, inputs) < density
    return kind(inputs, outputs, bias, dtype=dtype, mask=mask)


def values_of(layer):
    return layer.weight if isinstance(layer, MaskedLinear) else layer.weight_values


def dense_weight(layer):
    return layer.weight.detach() * layer.weight_mask if isinstance(layer, MaskedLinear) else layer.to_dense().weight


def counted(layer, x):
    """The result of a call without gradients, and whether it came from kept survivors."""
    name = "masked_linear" if isinstance(layer, MaskedLinear) else "sparse_linear"
    before = ops.CALLS[name, "numba-kept"]
    with torch.no_grad():
        y = layer(x)
    return y, ops.CALLS[name, "numba-kept"] > before


def check(layer, rows=1, keeps=True):
    x = torch.randn(rows, layer.in_features, dtype=values_of(layer).dtype)
    y, from_kept = counted(layer, x)
    assert from_kept == keeps
    assert_close_to_exact(y, linear(x, dense_weight(layer), layer.bias))
    return y


@watches
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 70])
@pytest.mark.parametrize("shape", [(100, 300), (513, 129), (40, 1000), (7, 3000)])
def test_products(kind, dtype, rows, shape):
    layer = made(kind, *shape, dtype=dtype, density=0.2 if rows % 2 else 0.03)
    values = values_of(layer)
    fills_a_page = values.nbytes >= 2 * mmap.PAGESIZE  # or is not watched
    if fills_a_page or values.nbytes < mmap.PAGESIZE:
        check(layer, rows, keeps=fills_a_page)
        check(layer, rows, keeps=fills_a_page)


def test_large_products_have_the_same_bits_for_any_number_of_threads(monkeypatch):
    weight = torch.randn(1100, 1300)
    mask = torch.rand(1100, 1300) < 0.3
    index = pattern_tensors(mask)[:2]
    before, in_parallel = torch.get_num_threads(), []
    found, real = [], many_rows.among
    monkeypatch.setattr(many_rows, "among", lambda workers: in_parallel.append(workers) or real(workers))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            values = many_rows.in_order((weight.data_ptr(), *weight.stride()), mask.shape, weight.dtype, index)
            for rows in (1, 2, 9):
                x = torch.arange(rows * 1300).remainder(13).float().view(rows, 1300)
                found.append(many_rows.multiply(x, (values.data_ptr(),), 1100, None, *index))
        finally:
            torch.set_num_threads(before)
    assert 2 in in_parallel or os.cpu_count() == 1
    for i in range(3):
        assert torch.equal(bits(found[i]), bits(found[3 + i]))
        assert torch.equal(bits(found[i]), bits(found[6 + i]))
        assert found[i].shape == (found[i].shape[0], 1100)


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_an_ordered_source_has_the_bits_of_the_others(rows):
    """Where they run the same kernel."""
    mask = torch.rand(300, 500) < 0.15
    weight = torch.randn(300, 500) * mask
    values = weight[mask]
    x = torch.randn(rows, 500)
    assert rows <= few_rows.FEW_ORDERED or rows > few_rows.FEW
    units, columns, starts = sparse_tensors(mask)[:3]
    sources = [(weight.data_ptr(), *weight.stride()), (values.data_ptr(), starts.data_ptr(), values.numel(), 0)]
    for source in sources:
        ordered = many_rows.in_order(source, (300, 500), torch.float32, [units, columns])
        one = many_rows.multiply(x, source, 300, None, units, columns)
        other = many_rows.multiply(x, (ordered.data_ptr(),), 300, None, units, columns)
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (300, 257), (64, 128)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_every_slot_holds_its_weight(dtype, shape, density):
    mask = torch.rand(shape) < density
    weight = torch.randn(shape).to(dtype)
    units, columns = (t.numpy() for t in pattern_tensors(mask)[:2])
    index = [torch.from_numpy(units), torch.from_numpy(columns)]
    values = many_rows.in_order((weight.data_ptr(), *weight.stride()), shape, dtype, index)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    panels, blocks, per_panel, _ = units.shape
    block = 128 if blocks == -(-shape[1] // 128) else 256
    seen = np.zeros(shape, bool)
    for p in range(panels):
        for kb in range(blocks):
            for numbers, low, high, start in units[p, kb]:
                steps = int(np.uint32(high) >> 16)
                counts = [int(np.uint32(v) >> s & 0xFFFF) for v in (low, high) for s in (0, 16)]
                for r in range(4):
                    row = p * per_panel * 4 + (int(np.uint32(numbers)) >> 8 * r & 255)
                    for j in range(steps):
                        slot = int(start) + 4 * j + r
                        if j >= counts[r]:
                            assert values[slot] == 0
                            continue
                        column = kb * block + int(columns[slot])
                        assert values[slot] == weight[row, column]
                        seen[row, column] = True
    assert np.array_equal(seen, mask.numpy())


def survivor_by_data(weight):
    weight.data[tuple(weight.nonzero()[7])] = 100.0


def last_survivor_by_numpy(weight):
    flat = weight.detach().numpy().reshape(-1)
    flat[np.flatnonzero(flat)[-1]] = 100.0


def a_survivor_counted(weight):
    with torch.no_grad():
        weight[tuple(weight.nonzero()[3])] = 100.0


def other_memory(weight):
    weight.data = 3 * weight.detach()


def by_copy(weight):
    with torch.no_grad():
        weight.copy_(2 * weight)


def by_ema(weight):
    weight.data.lerp_(torch.ones_like(weight) * (weight != 0), 0.25)


@watches
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "write", [survivor_by_data, last_survivor_by_numpy, a_survivor_counted, other_memory, by_copy, by_ema]
)
def test_a_write_counts_at_the_next_call(kind, write):
    layer = made(kind)
    check(layer)
    check(layer)
    write(values_of(layer))
    check(layer)


@watches
@pytest.mark.parametrize("write", WRITES)
def test_a_write_past_the_mask(write):
    layer = made(MaskedLinear)
    check(layer)
    write(layer.weight)
    check(layer, keeps=layer.weight.is_contiguous())


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_bias_and_mask_count_at_the_next_call(kind, monkeypatch):
    monkeypatch.setattr(ordered_copy, "TRIES", 9)
    layer = made(kind)
    check(layer)
    layer.bias.data.add_(5)
    check(layer)
    layer.set_mask(torch.rand(100, 300) < 0.3)
    check(layer)
    layer.load_state_dict(made(kind, density=0.4).state_dict())
    check(layer)


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_training_between_calls(kind):
    layer = made(kind)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(3):
        for _ in range(ordered_copy.REPAID):
            check(layer)
        optimizer.zero_grad()
        layer(torch.randn(4, 300)).square().sum().backward()
        optimizer.step()
    layer(torch.randn(4, 300))
    assert layer._kept.copy is None  # and the next step meets no protected page


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_never_lost(kind):
    layer = made(kind)
    check(layer)
    x = torch.randn(2, 300, requires_grad=True)
    y = layer(x)
    assert y.requires_grad
    y.sum().backward()
    assert_close_to_exact(x.grad, product(torch.ones(2, 100), dense_weight(layer)))
    assert values_of(layer).grad is not None


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_keep_changing_are_not_kept_until_they_rest(kind):
    layer = made(kind)
    for expected in (True,) * ordered_copy.TRIES + (False,) * 3:
        check(layer, keeps=expected)
        values_of(layer).data.mul_(1.5) if expected else values_of(layer).detach().mul_(1.5)
    check(layer, keeps=False)
    for _ in range(ordered_copy.REPAID):
        check(layer, keeps=False)  # as it began with this weight: the same bits while nothing is written
    values_of(layer).detach().mul_(0.5)
    check(layer)


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weight_gives_the_same_bits(kind):
    layer = made(kind)
    x = torch.randn(1, 300)
    first, _ = counted(layer, x)
    for _ in range(2 * ordered_copy.REPAID):
        assert torch.equal(bits(counted(layer, x)[0]), bits(first))


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_copies_keep_nothing(kind):
    layer = made(kind)
    check(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._kept is None
        values_of(other).data.mul_(2)
        check(other)
    check(layer)


@watches
def test_tied_weights():
    one, two = made(MaskedLinear), made(MaskedLinear)
    two.weight = one.weight
    for _ in range(3):
        one.weight.data.mul_(1.5)
        check(
            one,
            keeps=one._kept is None
            or one._kept.failures + (one._kept.calls < ordered_copy.REPAID) < ordered_copy.TRIES,
        )
        check(
            two,
            keeps=two._kept is None
            or two._kept.failures + (two._kept.calls < ordered_copy.REPAID) < ordered_copy.TRIES,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_can_be_watched(kind, monkeypatch):
    monkeypatch.setattr(ordered_copy, "watch", lambda *_: None)
    layer = made(kind)
    check(layer, keeps=False)
    survivor_by_data(values_of(layer))
    check(layer, keeps=False)


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_shared_weights_are_not_kept(kind):
    layer = made(kind).share_memory()
    check(layer, keeps=False)


@watches
def test_memory_that_is_read_as_another_dtype():
    layer = made(MaskedLinear, dtype=torch.float16)
    check(layer)
    layer.weight.data = layer.weight.data.view(torch.bfloat16)
    layer.bias.data = layer.bias.data.to(torch.bfloat16)
    check(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_not_asked_for_ever(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(ordered_copy, "watch", lambda *where: asked.append(where))
    layer = made(kind)
    for _ in range(3 * ordered_copy.TRIES):
        values_of(layer).detach().mul_(1.5)
        check(layer, keeps=False)
    assert len(asked) == ordered_copy.TRIES


@watches
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["meta", "mask", "double"])
def test_nothing_is_kept_of_a_layer_that_changed(kind, change):
    layer = made(kind)
    check(layer)
    assert layer._kept.copy.values is not None
    if change == "meta":
        layer.to("meta")
    elif change == "mask":
        layer.set_mask(~layer.weight_mask)
    else:
        layer.double()
    assert layer._kept is None


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_other_shapes_of_input(kind):
    with torch.inference_mode():
        layer = made(kind)
        x = torch.randn(2, 3, 300)
        y = layer(x)
        assert_close_to_exact(y, linear(x, dense_weight(layer), layer.bias))
        assert layer._kept.copy.values is not None
        assert layer(x[0, 0]).shape == (100,)
        assert layer(x[:0]).shape == (0, 3, 100)
        assert_close_to_exact(layer(x.transpose(0, 1)), linear(x.transpose(0, 1), dense_weight(layer), layer.bias))
    with pytest.raises(RuntimeError, match="in_features"), torch.no_grad():
        layer(torch.randn(2, 299))


@watches
def test_a_write_during_the_copy(monkeypatch):
    layer, real = made(MaskedLinear), many_rows.in_order

    def then_written(*where):
        values = real(*where)
        survivor_by_data(layer.weight)
        return values

    monkeypatch.setattr(many_rows, "in_order", then_written)
    counted(layer, torch.randn(1, 300))
    monkeypatch.setattr(many_rows, "in_order", real)
    check(layer)


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_with_gradients_drops_what_was_written_alone(kind):
    layer = made(kind)
    check(layer)
    before = layer._kept.copy
    layer(torch.randn(1, 300))
    assert layer._kept.copy is before
    with torch.no_grad():
        values_of(layer).mul_(1.5)
    layer(torch.randn(1, 300))
    assert layer._kept.copy is None


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_parametrized_after_inference_trains(kind):
    layer = made(kind)
    check(layer)
    name = next(name for name, p in layer.named_parameters() if p is values_of(layer))
    x = torch.randn(1, 300)
    want = linear(x, dense_weight(layer), layer.bias)
    assert_close_to_exact(layer(x), want)
    parametrize.register_parametrization(layer, name, torch.nn.Identity())
    assert_close_to_exact(layer(x), want)


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_dropped_copies_count_as_failures(kind):
    layer = made(kind)
    for i in range(ordered_copy.TRIES + 1):
        check(layer, keeps=i < ordered_copy.TRIES)
        with torch.no_grad():
            values_of(layer).mul_(1.5)
        layer(torch.randn(1, 300))


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_each_copy_must_be_repaid_anew(kind):
    layer = made(kind)
    for _ in range(ordered_copy.REPAID):
        check(layer)
    for i in range(ordered_copy.TRIES + 1):
        values_of(layer).data.mul_(1.1)
        check(layer, keeps=i < ordered_copy.TRIES)


@watches
def test_other_strides_alone():
    layer = made(MaskedLinear, 200, 200, density=2.0)
    mask = torch.rand(200, 200) < 0.2
    layer.set_mask(mask | mask.t())
    check(layer)
    layer.weight.data = layer.weight.data.t()
    check(layer, keeps=False)


@watches
def test_another_mask_of_as_many_survivors():
    layer = made(SparseLinear)
    check(layer)
    layer.weight_mask_bits.copy_(pack_bits(layer.weight_mask.flatten().roll(7).view(100, 300)))
    check(layer)


def test_pinned_memory_is_not_kept(monkeypatch):
    """A device may write it, which no page tells."""
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda *_: True)
    check(made(MaskedLinear), keeps=False)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_where_the_reference_runs(kind, monkeypatch):
    monkeypatch.setattr(ops, "backend_of", lambda *_: "reference")
    check(made(kind), keeps=False)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept_where_nothing_is_pruned(kind):
    check(made(kind, density=2.0), keeps=False)


@pytest.mark.parametrize("kind", KINDS)
def test_whether_it_pays_is_asked_by_rows_and_survivors(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "kept_pays", lambda *about: asked.append(about) or True)
    layer = made(kind)
    counted(layer, torch.randn(2, 3, 300))
    nnz = int((dense_weight(layer) != 0).sum())
    assert asked == [("masked" if kind is MaskedLinear else "sparse", 6, 30_000, nnz, torch.float32)]


def test_a_weight_that_is_not_the_layers_own():
    layer, x, weight = made(MaskedLinear), torch.randn(2, 300), torch.randn(100, 300)
    with torch.no_grad():
        y = torch.func.functional_call(layer, {"weight": weight}, (x,))
    assert_close_to_exact(y, linear(x, weight * layer.weight_mask, layer.bias))
    assert layer._kept is None


@watches
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    layer, x = made(kind), torch.randn(2, 300)
    check(layer)
    before = ops.CALLS.copy()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert not any(backend == "numba-kept" for _, backend in ops.CALLS - before)


@watches
def test_conversions_forget():
    model = torch.nn.Sequential(made(SparseLinear), torch.nn.Linear(100, 5))
    check(model[0])
    densify(model)
    assert type(model[0]) is torch.nn.Linear
    assert "_kept" not in model[0].__dict__


def test_few_rows_and_more_have_kernels_of_their_own(monkeypatch):
    mask = torch.rand(70, 300) < 0.3
    weight, index = torch.randn(70, 300), pattern_tensors(mask)[:2]
    values = many_rows.in_order((weight.data_ptr(), *weight.stride()), (70, 300), torch.float32, index)
    called, real = [], many_rows.call_few
    monkeypatch.setattr(many_rows, "call_few", lambda *about: called.append(len(about[1])) or real(*about))
    for rows in (1, 2, 3, 4):
        many_rows.multiply(torch.randn(rows, 300), (values.data_ptr(),), 70, None, *index)
    assert called == [1, 2]


def test_only_from_a_size_on(monkeypatch):
    monkeypatch.setattr(ordered_copy, "LEAST", 100 * 300 + 1)
    check(made(MaskedLinear), keeps=False)


def test_by_density_rows_and_mode():
    pays = _PAYS
    assert pays("masked", 1, 1 << 24, 1 << 20, torch.float32)
    assert not pays("masked", 1, 1 << 18, 1 << 14, torch.float32)
    assert not pays("masked", 4, 1 << 22, 1 << 21, torch.float32)
    with choice.prefer("dense"):
        assert not pays("masked", 1, 1 << 24, 1 << 20, torch.float32)
    with choice.prefer("sparse"):
        assert pays("masked", 4, 1 << 22, 1 << 21, torch.float32)


_PAYS = choice.kept_pays


def test_the_table():
    below, table = choice._kept_below, choice.KEPT if choice.has_avx512() else choice.KEPT_NARROW
    assert below("sparse", 1, 1 << 18, 4) == table["sparse"][0][0]
    assert below("masked", 1, 1 << 24, 2) == table["masked"][0][2] / 2
    assert below("masked", 4, 1 << 24, 4) == table["masked"][1][2]
    one, four = (row[1] for row in table["masked"][:2])
    assert below("masked", 2, 1 << 22, 4) == pytest.approx((one + four) / 2)
    assert below("masked", 1, 1 << 23, 4) == pytest.approx((one + table["masked"][0][2]) / 2)
