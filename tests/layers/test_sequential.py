"""SparseSequential computes runs of small compressed layers at once, and nobody can tell but by the clock."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from chains import assert_right, dense_of, in_threads, layer, model, with_threads
from initperf import SparseLinear, SparseSequential, densify, ops, sparsify
from initperf.choice import prefer
from initperf.core.checks import InitPerfError
from initperf.layers import sequential
from tolerance import assert_near, bits

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def sparse_products():
    with prefer("sparse"):
        yield


def runs_counted(call):
    before = ops.CALLS["sparse_chain", "numba"]
    result = call()
    return result, ops.CALLS["sparse_chain", "numba"] - before


def check(ours, x):
    with torch.no_grad():
        got, count = runs_counted(lambda: ours(x))
        assert count == 1
        assert_right(got, ours, x)
    return got


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17, 33, 64, 65, 200])
@pytest.mark.parametrize("widths", [(784, 300, 100, 10), (130, 257, 3), (20, 1, 40, 16)])
def test_it_computes_what_the_dense_network_computes(widths, rows):
    check(model(*widths), torch.randn(rows, widths[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_every_dtype(dtype, rows):
    check(model(200, 90, 30, dtype=dtype), torch.randn(rows, 200).to(dtype))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("density", [0.004, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last_relu", [True, False])
def test_densities_biases_and_a_relu_at_the_end(rows, density, bias, last_relu):
    check(model(300, 150, 20, density=density, bias=bias, last_relu=last_relu), torch.randn(rows, 300))


@pytest.mark.parametrize("rows", [1, 3, 40, 300])
def test_the_bits_do_not_depend_on_threads(rows):
    ours, x = model(784, 300, 100, 10), torch.randn(rows, 784)
    with torch.no_grad():
        found = with_threads((1, 2, 3), lambda: bits(ours(x)))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("rows", [1, 2, 64, 256])
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(rows):
    """In batches that run with the same lanes: 1 to 4 rows, and whole blocks of 64."""
    ours, x = model(100, 60, 10), torch.randn(rows, 100)
    with torch.no_grad():
        alone, among = ours(x), ours(torch.cat([x, torch.randn(rows, 100)]))
    assert torch.equal(bits(alone), bits(among[:rows]))


@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 3, 100), (0, 100), (0, 2, 100)])
def test_inputs_of_any_number_of_dimensions(shape):
    ours, x = model(100, 60, 10), torch.randn(shape)
    with torch.no_grad():
        assert_right(ours(x), ours, x)


def test_inputs_that_are_not_contiguous():
    ours, x = model(100, 60, 10), torch.randn(100, 7).t()
    with torch.no_grad():
        assert_right(ours(x), ours, x)
        assert_right(ours(x[:1].expand(9, -1)), ours, x[:1].expand(9, -1))
        every_second = torch.randn(3, 200)[:, ::2][:1]
        assert_right(ours(every_second), ours, every_second)


@pytest.mark.parametrize("rows", [1, 40])
def test_nan_and_infinity_spread_as_in_a_dense_network(rows):
    ours, x = model(100, 60, 10, density=1.0), torch.randn(rows, 100)
    x[0, 3], x[-1, 5] = float("inf"), float("nan")
    with torch.no_grad():
        assert torch.equal(ours(x).isnan(), dense_of(ours)(x).isnan())


@pytest.mark.parametrize("rows", [1, 40])
def test_whatever_changes_a_parameter_is_seen(rows):
    ours, x = model(100, 60, 10), torch.randn(rows, 100)
    first: SparseLinear = ours[0]
    check(ours, x)
    first.weight_values.data.mul_(2)
    check(ours, x)
    first.weight_values.detach().numpy()[-1] = 7
    check(ours, x)
    with torch.no_grad():
        first.bias.add_(1)
    check(ours, x)
    first.weight_values.data = torch.randn_like(first.weight_values)
    check(ours, x)
    ours[2].bias = nn.Parameter(torch.randn(10))
    check(ours, x)
    ours[2].bias = None
    check(ours, x)
    first.set_mask(torch.rand(60, 100) < 0.1)
    check(ours, x)
    ours.load_state_dict(model(100, 60, 10, density=0.3, bias=True).state_dict() | {}, strict=False)
    check(ours, x)
    ours[0] = layer(100, 60, 0.4, seed=9)
    check(ours, x)
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.1)
    ours(x).square().sum().backward()
    optimizer.step()
    check(ours, x)


@pytest.mark.parametrize("place", [0, 1, 777, -2, -1])
def test_a_change_of_any_single_value_is_seen(place):
    ours, x = model(100, 61, 10, density=0.3), torch.randn(1, 100)
    check(ours, x)
    with torch.no_grad():
        ours[0].weight_values.data[place] += 100
    check(ours, x)


def test_rows_few_and_many_each_see_a_change():
    ours, few, many = model(100, 60, 10), torch.randn(1, 100), torch.randn(40, 100)
    for _ in range(3):
        check(ours, few)
        check(ours, many)
        ours[2].weight_values.data.mul_(-3)


def test_hooks_see_every_child():
    ours, x, seen = model(100, 60, 10), torch.randn(4, 100), []
    with torch.no_grad():
        before = ours(x)
        handles = [
            ours[0].register_forward_hook(lambda *a: seen.append("hook")),
            ours[1].register_forward_pre_hook(lambda *a: seen.append("pre-hook")),
        ]
        assert_near(ours(x), before)
        assert seen == ["hook", "pre-hook"]
        for handle in handles:
            handle.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(type(m).__name__))
        try:
            ours(x)
        finally:
            everywhere.remove()
    assert seen[2:] == ["SparseLinear", "ReLU", "SparseLinear", "SparseSequential"]


def test_a_forward_of_its_own_is_called():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    ours[1].forward = lambda x: x * 0
    with torch.no_grad():
        assert torch.equal(ours(x), ours[2].bias.expand(4, 10))


def test_dropout_is_skipped_in_evaluation_only():
    ours = SparseSequential(layer(100, 60), nn.ReLU(), nn.Dropout(0.9), nn.Identity(), layer(60, 10, seed=1))
    x = torch.randn(4, 100)
    with torch.no_grad():
        ours.eval()
        got, count = runs_counted(lambda: ours(x))
        assert_near(got, dense_of(ours).eval()(x))
        assert count == 1
        ours.train()
        assert not torch.allclose(ours(x), got)


def test_relu_in_place_leaves_the_input_alone():
    ours = SparseSequential(layer(100, 60), nn.ReLU(inplace=True), layer(60, 10, seed=1))
    x = torch.randn(4, 100)
    check(ours, x)


def test_other_children_are_called_between_runs():
    parts = [
        nn.Flatten(),
        layer(100, 60),
        nn.ReLU(),
        nn.LayerNorm(60),
        nn.ReLU(),
        layer(60, 50, seed=1),
        layer(50, 9, seed=2),
    ]
    ours = SparseSequential(*parts, nn.Softmax(1))
    x = torch.randn(4, 10, 10)
    with torch.no_grad():
        got, count = runs_counted(lambda: ours(x))
        assert_near(got, dense_of(ours)(x))
    assert count == 2


def test_two_relus_and_a_layer_alone():
    ours = SparseSequential(layer(100, 60), nn.ReLU(), nn.ReLU(), nn.Tanh(), layer(60, 10, seed=1))
    with torch.no_grad():
        x = torch.randn(4, 100)
        assert_near(ours(x), dense_of(ours)(x))


def test_other_parameters_by_functional_call():
    ours, other, x = model(100, 60, 10), model(100, 60, 10), torch.randn(4, 100)
    with torch.no_grad():
        for p in other.parameters():
            p.uniform_(-1, 1)
        before = ours(x)
        found = functional_call(ours, dict(other.named_parameters()), (x,))
        assert_right(found, other, x)
        assert torch.equal(ours(x), before)


def test_autocast_and_compilation_call_the_layers():
    ours, x = model(100, 60, 10), torch.randn(8, 100)
    with torch.no_grad():
        want = ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == torch.bfloat16
        assert_near(torch.compile(ours, fullgraph=True, backend="eager")(x), want)
        traced = torch.jit.trace(ours, torch.randn(3, 100), check_trace=False)
        assert_near(traced(x), want)


def test_wrong_inputs_get_the_layers_errors():
    ours = model(100, 60, 10)
    with torch.no_grad():
        for x in (torch.randn(3, 99), torch.randn(3, 100).double(), torch.tensor(1.0)):
            with pytest.raises(InitPerfError, match="Expected an input"):
                ours(x)
    unfit = SparseSequential(layer(100, 60), nn.ReLU(), layer(50, 10))
    with torch.no_grad(), pytest.raises(InitPerfError, match="last dimension is 50"):
        unfit(torch.randn(3, 100))


def test_layers_beyond_the_limit_are_called_alone(monkeypatch):
    monkeypatch.setattr(sequential, "LARGEST", 2000)
    ours, x = (
        SparseSequential(layer(100, 60), nn.ReLU(), layer(60, 10, seed=1), layer(10, 400, 0.99, seed=2)),
        torch.randn(4, 100),
    )
    with torch.no_grad():
        got, count = runs_counted(lambda: ours(x))
        assert_right(got, ours, x)
        assert count == 1
        ours[0].set_mask(torch.ones(60, 100, dtype=torch.bool))
        got, count = runs_counted(lambda: ours(x))
        assert_right(got, ours, x)
        assert count == 0


def test_an_empty_mask():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    ours[2].set_mask(torch.zeros(10, 60, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(ours(x), ours[2].bias.expand(4, 10))


def test_mixed_dtypes_raise_as_the_layers_do():
    ours = SparseSequential(layer(100, 60), nn.ReLU(), layer(60, 10, seed=1).double())
    with torch.no_grad(), pytest.raises(InitPerfError, match="dtype"):
        ours(torch.randn(2, 100))


def test_where_dense_products_pay_the_layers_are_called():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    with torch.no_grad(), prefer("dense"):
        _, count = runs_counted(lambda: ours(x))
    assert count == 0


def test_copies_and_pickles():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    with torch.no_grad():
        want = ours(x)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(other) is SparseSequential
            assert torch.equal(other(x), want)
            other[0].weight_values.mul_(2)
            assert not torch.equal(other(x), want)
        assert torch.equal(ours(x), want)


def test_sparsify_makes_it_and_densify_takes_it_back():
    inner = nn.Sequential(nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 10))
    whole = nn.Sequential(nn.Linear(100, 60), nn.ReLU(), inner)
    keys = list(whole.state_dict())
    assert type(sparsify(whole, density=0.2)) is nn.Sequential  # masked layers have dense weights
    sparsify(whole, density=0.1, sparse=True)
    assert type(whole) is type(inner) is SparseSequential
    x = torch.randn(3, 100)
    with torch.no_grad():
        got, count = runs_counted(lambda: whole(x))
        assert count == 2
        densify(whole)
        assert type(whole) is type(inner) is nn.Sequential
        assert list(whole.state_dict()) == keys
        assert_near(got, whole(x))


def test_a_subclass_of_sequential_stays_what_it_is():
    class Mine(nn.Sequential):
        pass

    mine = sparsify(Mine(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), density=0.5, sparse=True)
    assert type(mine) is Mine


@pytest.mark.parametrize("round", range(6))
def test_threads_that_share_a_network_whose_values_were_just_changed(round):
    ours = model(784, 300, 100, 10)
    x = torch.randn(40, 784, generator=torch.Generator().manual_seed(round))
    wrong, start = [], threading.Barrier(4)

    def work(number):
        for step in range(8):
            start.wait()
            if number == 0:
                with torch.no_grad():
                    ours[0].weight_values.mul_(-1.5)
                    ours[2].weight_values.add_(0.01)
                    want = dense_of(ours)(x)
                wanted[0] = want
            start.wait()
            with torch.no_grad():
                rows = slice(None) if (number + step) % 2 else slice(1)
                for _ in range(3):
                    if not torch.allclose(ours(x[rows]), wanted[0][rows], rtol=1e-3, atol=1e-3 * wanted[0].abs().max()):
                        wrong.append((number, step))

    wanted = [None]
    in_threads(work)
    assert not wrong


def test_a_parameter_or_class_replaced_after_the_first_call():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    class Loud(SparseLinear):
        def forward(self, input):
            return super().forward(input) + 1

    ours, x = model(100, 60, 10), torch.randn(4, 100)
    with torch.no_grad():
        before = ours(x)
        parametrize.register_parametrization(ours[2], "bias", Doubled())
        assert_near(ours(x), before + ours[2].parametrizations.bias.original)
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    with torch.no_grad():
        before = ours(x)
        ours[2].__class__ = Loud
        assert_near(ours(x), before + 1)


def test_conversions_between_calls():
    ours, x = model(100, 60, 10), torch.randn(4, 100)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.float32, torch.float64, torch.bfloat16):
        check(ours.to(dtype), x.to(dtype))


@pytest.mark.parametrize("input", [None, {"x": 1}, [1.0], 3.0])
def test_what_is_no_tensor_gets_the_layers_error(input):
    ours = model(100, 60, 10)
    with torch.no_grad(), pytest.raises(InitPerfError, match="Tensor"):
        ours(input)


def test_children_that_take_or_give_anything():
    class Unpack(nn.Module):
        def forward(self, batch):
            return batch["x"]

    class Meta(nn.Module):
        def forward(self, x):
            return x.to("meta")

    layers = list(model(100, 60, 10))
    ours, x = SparseSequential(Unpack(), *layers), torch.randn(4, 100)
    with torch.no_grad():
        assert_near(ours({"x": x}), SparseSequential(*layers)(x))
        assert SparseSequential(Meta(), *layers)(x).is_meta
        named = x.as_subclass(type("Named", (torch.Tensor,), {}))
        assert type(SparseSequential(*layers)(named)) is type(named)
        with pytest.raises(TypeError):
            SparseSequential(*layers, None)(x)


def test_forward_mode_derivatives():
    ours, x, tangent = model(100, 60, 10), torch.randn(4, 100), torch.randn(4, 100)
    ours.requires_grad_(False)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        found = torch.autograd.forward_ad.unpack_dual(ours(torch.autograd.forward_ad.make_dual(x, tangent))).tangent
        want = torch.autograd.forward_ad.unpack_dual(
            dense_of(ours)(torch.autograd.forward_ad.make_dual(x, tangent))
        ).tangent
    assert_near(found, want)


def test_very_sparse_layers_are_called_alone(monkeypatch):
    monkeypatch.setattr(sequential, "LARGEST", 100)
    ours = model(100, 70, 10, density=0.002)
    with torch.no_grad():
        x = torch.randn(4, 100)
        got, count = runs_counted(lambda: ours(x))
        assert_right(got, ours, x)
    assert count == 0


def test_threads_that_share_a_network():
    ours, x = model(784, 300, 100, 10), torch.randn(40, 784)
    with torch.no_grad():
        want = [ours(x), ours(x[:1])]
    wrong = []

    def work():
        with torch.no_grad():
            for i in range(200):
                one = i % 2
                if not torch.equal(ours(x[:1] if one else x), want[one]):
                    wrong.append(i)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
