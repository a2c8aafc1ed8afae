"""MaskedConv2d and SparseConv2d are nn.Conv2d with a mask: every argument, values, gradients, checkpoints, training."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from initperf import MaskedConv2d, SparseConv2d, check_masks, densify, ops, sparsify
from initperf.choice import prefer
from initperf.core.checks import InitPerfError
from initperf.layers.ops.conv2d import conv_pays
from tolerance import assert_close_to_exact, assert_near, bits, of_convolution, of_squares

pytest.importorskip("numba")

ARGUMENTS = {
    "padding": {"padding": 1},
    "no padding": {},
    "more padding than reach": {"padding": 4},
    "uneven padding": {"padding": (0, 2)},
    "same": {"padding": "same", "kernel_size": (2, 4)},
    "same, one side even": {"padding": "same", "kernel_size": (3, 4)},
    "valid": {"padding": "valid"},
    "stride 2": {"stride": 2, "padding": 1},
    "stride 2 down": {"stride": (2, 1), "padding": 1},
    "stride 3": {"stride": (2, 3)},
    "dilation": {"dilation": (2, 1), "padding": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "out_channels": 12},
    "one tap": {"kernel_size": 1},
    "wide": {"kernel_size": (1, 7), "padding": (0, 3)},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": "same", "padding_mode": "circular"},
    "no bias": {"bias": False},
}
KINDS = [MaskedConv2d, SparseConv2d]


@pytest.fixture(params=["kernel", "dense"])
def path(request):
    """Both convolutions that an op may choose."""
    with prefer("sparse" if request.param == "kernel" else "dense"):
        yield request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def layer_of(kind, density=0.2, seed=0, **given):
    arguments = {"in_channels": 6, "out_channels": 10, "kernel_size": 3, **given}
    shape = nn.Conv2d(**arguments, device="meta").weight.shape
    torch.manual_seed(seed)
    return kind(**arguments, mask=torch.rand(shape) < density)


def stored(layer, dense):
    """A tensor of the dense weight's shape as the layer stores its own."""
    return layer.compress(dense) if isinstance(layer, SparseConv2d) else dense.masked_fill(~layer.weight_mask, 0)


def results(layer, x, dy):
    """y, and the gradients of x, of the weight (dense) and of the bias."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    weight = layer.weight_values if isinstance(layer, SparseConv2d) else layer.weight
    bias = [] if layer.bias is None else [layer.bias.grad]
    return [y.detach(), x.grad, weight.grad, *bias]


def check(layer, x):
    twin = layer.to_conv()
    dy = torch.randn_like(twin(x))
    expected = of_convolution(twin, x, dy)
    expected[2] = expected[2].at(lambda t: stored(layer, t))
    for got, right in zip(results(layer, x, dy), expected, strict=True):
        assert_close_to_exact(got, right)


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_values_and_gradients_are_those_of_conv2d(kind, path, arguments):
    check(layer_of(kind, **arguments), torch.randn(19, 6, 11, 13))


@pytest.mark.parametrize("size", [(3, 3), (3, 4), (5, 6), (4, 10), (32, 3), (7, 33)])
@pytest.mark.parametrize("batch", [1, 16, 33])
def test_images_and_batches_of_any_size(path, size, batch):
    x = torch.randn(batch, 6, *size)
    for layer in (layer_of(MaskedConv2d, padding=1), layer_of(MaskedConv2d)):
        check(layer, x)


@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_any_density_over_many_channel_blocks(kind, path, density):
    layer = layer_of(kind, density, in_channels=70, out_channels=20, padding=1)
    check(layer, torch.randn(17, 70, 8, 9))


def test_float64(kind, path):
    check(layer_of(kind, padding=1).double(), torch.randn(5, 6, 7, 9).double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_torchs_own_convolutions_run(kind, path, dtype):
    """Their gradients are summed in 16 bits where the processor has no instructions for them: no bound, but the same bits."""
    layer, x = layer_of(kind, padding=1).to(dtype), torch.randn(5, 6, 7, 9).to(dtype)
    twin, dy = layer.to_conv(), torch.randn(5, 10, 7, 9).to(dtype)
    theirs = results(twin, x, dy)
    theirs[2] = stored(layer, theirs[2])
    assert all(torch.equal(a, b) for a, b in zip(results(layer, x, dy), theirs, strict=True))


def test_the_kernel_runs_where_it_is_preferred_and_stride_one_backward(kind):
    before = ops.CALLS.copy()
    with prefer("sparse"):
        layer = layer_of(kind, padding=1)
        results(layer, torch.randn(16, 6, 8, 8), torch.ones(16, 10, 8, 8))
    calls = {name: number for name, number in (ops.CALLS - before).items() if name[0].startswith("masked_conv2d")}
    names = ("masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight")
    assert calls == {(name, "numba"): 1 for name in names}


def test_pruned_weights_have_gradients_of_exactly_zero(path):
    layer = layer_of(MaskedConv2d, padding=1)
    results(layer, torch.randn(16, 6, 8, 8), torch.ones(16, 10, 8, 8))
    assert not bits(layer.weight)[~layer.weight_mask].any()
    assert not bits(layer.weight.grad)[~layer.weight_mask].any()
    assert layer.weight.grad[layer.weight_mask].all()


def test_nothing_survives(kind, path):
    layer = layer_of(kind, density=0.0, padding=1)
    x = torch.randn(16, 6, 8, 8)
    y, dx, dw, _ = results(layer, x, torch.ones(16, 10, 8, 8))
    assert torch.equal(y, layer.bias.detach().view(1, -1, 1, 1).expand_as(y))
    assert not dx.any()
    assert not dw.any()


def test_dead_channels_are_neither_read_nor_written(kind):
    mask = torch.zeros(10, 6, 3, 3, dtype=torch.bool)
    mask[2, 4] = True
    layer = kind(6, 10, 3, padding=1, mask=mask)
    x = torch.randn(16, 6, 8, 8)
    assert layer._fresh_pattern().tensors[3].tolist() == [4]
    poisoned = x.clone()
    poisoned[:, :4] = torch.nan
    with prefer("sparse"), torch.no_grad():
        assert torch.equal(layer(poisoned), layer(x))


def test_no_images_and_one_image_without_batch(kind, path):
    layer = layer_of(kind, padding=1)
    assert layer(torch.randn(0, 6, 8, 8)).shape == (0, 10, 8, 8)
    x = torch.randn(6, 8, 8)
    y = layer(x)
    assert torch.equal(y, layer(x[None])[0])


def test_images_of_other_strides(kind, path):
    layer = layer_of(kind, padding=1)
    x = torch.randn(16, 6, 8, 12)
    (expected,) = of_convolution(layer.to_conv(), x)
    for other in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert_close_to_exact(layer(other), expected)


def test_the_bits_do_not_depend_on_threads(kind):
    layer = layer_of(kind, in_channels=24, padding=1)
    x, dy = torch.randn(40, 24, 9, 9), torch.randn(40, 10, 9, 9)
    threads, found = torch.get_num_threads(), []
    with prefer("sparse"):
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                layer.zero_grad()
                found.append(results(layer, x, dy)[:3])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("arguments", [{"padding": 1}, {"stride": 2}], ids=str)
def test_second_derivatives_are_those_of_conv2d(kind, path, arguments):
    layer = layer_of(kind, **arguments).double()
    twin = layer.to_conv()
    x = torch.randn(3, 6, 6, 7, dtype=torch.float64)

    def second(module, weight):
        own = x.clone().requires_grad_()
        dx, dw = torch.autograd.grad(module(own).pow(2).sum(), (own, weight), create_graph=True)
        return torch.autograd.grad(dx.pow(2).sum() + (dw**2).sum(), (own, weight))

    weight = layer.weight_values if kind is SparseConv2d else layer.weight
    mask = layer.weight_mask
    (dx, dw), masked = second(layer, weight), torch.zeros_like(twin.weight)
    masked[mask] = 1
    parameter = twin.weight

    def masked_conv(own):
        return twin._conv_forward(own, parameter * masked, twin.bias)

    true_dx, true_dw = second(masked_conv, parameter)
    assert_near(dx, true_dx)
    assert_near(dw, stored(layer, true_dw))


def test_second_derivatives_through_the_kernels(kind):
    with prefer("sparse"):
        layer = layer_of(kind, padding=1)
        exact = copy.deepcopy(layer).double()
        found = []
        for module, dtype in ((layer, torch.float32), (exact, torch.float64)):
            torch.manual_seed(1)
            x = torch.randn(4, 6, 5, 9).to(dtype).requires_grad_()
            parameter = module.weight_values if kind is SparseConv2d else module.weight
            dx, dw = torch.autograd.grad(module(x).pow(2).mean(), (x, parameter), create_graph=True)
            found.append(torch.autograd.grad(dx.pow(2).mean() + dw.pow(2).mean(), (x, parameter)))
    for got, true in zip(*found, strict=True):
        assert_near(got, true.float())


def test_autocast_runs_as_conv2d_does(kind):
    layer = layer_of(kind, padding=1)
    x = torch.randn(5, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer.to_conv()(x))
    y.float().sum().backward()
    weight = layer.weight_values if kind is SparseConv2d else layer.weight
    assert weight.grad.dtype == torch.float32


def test_vmap_and_grad_of_torch_func(kind):
    layer = layer_of(kind, padding=1)
    x = torch.randn(3, 2, 6, 8, 8)
    expected = of_convolution(layer.to_conv(), x.flatten(0, 1))[0]
    assert_close_to_exact(torch.func.vmap(layer)(x).flatten(0, 1), expected)
    twin, mask = layer.to_conv(), layer.weight_mask
    free = {n: torch.randn_like(p) for n, p in twin.named_parameters()}
    dense = free | {"weight": free["weight"] * mask}
    own = {"bias": free["bias"], "weight": free["weight"]}
    if kind is SparseConv2d:
        own = {"bias": free["bias"], "weight_values": layer.compress(free["weight"])}

    def loss(weights):
        return torch.func.functional_call(layer, weights, x[0]).square().sum()

    mine = torch.func.grad(loss)(own)
    twin.load_state_dict(dense)
    y = of_convolution(twin, x[0])[0]
    _, _, dw, db = of_convolution(twin, x[0], of_squares(y))
    assert_close_to_exact(mine["bias"], db)
    assert_close_to_exact(mine[next(n for n in own if n != "bias")], dw.at(lambda t: stored(layer, t)))
    stacked = {n: torch.stack([p, 2 * p]) for n, p in own.items()}
    both = torch.vmap(lambda weights: torch.func.functional_call(layer, weights, x[0]))(stacked)
    assert_close_to_exact(both[0], y)


def test_the_ops_pass_opcheck(kind):
    layer = layer_of(kind, padding=1)
    pattern = layer._fresh_pattern()
    weight = (layer.weight_values if kind is SparseConv2d else layer.weight).detach()
    x, dy = torch.randn(4, 6, 5, 5, requires_grad=True), torch.randn(4, 10, 5, 5, requires_grad=True)
    weight.requires_grad_()
    rest = ([1, 1], [1, 1], [1, 1], 1)
    shape = [10, 6, 3, 3]
    own = torch.ops.initperf
    given = (pattern.survivors, pattern.tensors, shape)
    torch.library.opcheck(own.masked_conv2d.default, (x, weight, None, *given, *rest, False))
    torch.library.opcheck(own.masked_conv2d_grad_input.default, (dy, weight, *given, [5, 5], *rest, False))
    torch.library.opcheck(own.masked_conv2d_grad_weight.default, (dy, x, *given, *rest))


def test_compiled_it_gives_the_same(kind):
    layer = layer_of(kind, padding=1)
    x = torch.randn(16, 6, 8, 8)
    assert_close_to_exact(torch.compile(layer, backend="aot_eager")(x), of_convolution(layer.to_conv(), x)[0])


def test_a_conv2d_checkpoint_loads_and_the_mask_that_is_here_applies(kind):
    layer, dense = layer_of(kind), nn.Conv2d(6, 10, 3)
    layer.load_state_dict(dense.state_dict())
    expected = dense.weight.detach().masked_fill(~layer.weight_mask, 0)
    assert torch.equal(layer.to_conv().weight.detach(), expected)
    assert torch.equal(layer.bias, dense.bias)


def test_its_own_checkpoint_brings_the_mask_along(kind):
    layer, other = layer_of(kind), layer_of(kind, density=0.5, seed=1)
    memory = io.BytesIO()
    torch.save(layer.state_dict(), memory)
    memory.seek(0)
    other.load_state_dict(torch.load(memory))
    x = torch.randn(16, 6, 8, 8)
    assert torch.equal(other.weight_mask, layer.weight_mask)
    assert torch.equal(other(x), layer(x))


def test_a_checkpoint_of_another_shape_is_refused(kind):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer_of(kind).load_state_dict(nn.Conv2d(6, 10, 5).state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_independent(kind, copied):
    layer = layer_of(kind, padding=1)
    twin, x = copied(layer), torch.randn(16, 6, 8, 8)
    y = layer(x)
    assert torch.equal(twin(x), y)
    twin.set_mask(torch.zeros_like(twin.weight_mask))
    assert torch.equal(layer(x), y)


def test_from_conv_masked_keeps_the_parameter_and_compressed_copies_it():
    conv = nn.Conv2d(6, 10, 3, padding=1)
    mask = torch.rand(10, 6, 3, 3) < 0.3
    compressed = SparseConv2d.from_conv(conv, mask)
    assert conv.weight.all()
    masked = MaskedConv2d.from_conv(conv, mask)
    assert masked.weight is conv.weight
    x = torch.randn(16, 6, 8, 8)
    for layer in (masked, compressed):
        assert torch.equal(layer.to_conv().weight, conv.weight)
        assert_close_to_exact(layer(x), of_convolution(conv, x)[0])


def test_a_new_mask_revives_at_zero(kind):
    layer = layer_of(kind, padding=1)
    before = layer.to_conv().weight.detach()
    layer.set_mask(~layer.weight_mask)
    assert before.any()
    assert not layer.to_conv().weight.any()
    assert layer.density == pytest.approx(0.8, abs=0.1)


def test_the_repr_names_arguments_and_density(kind):
    text = repr(layer_of(kind, stride=2, padding=1))
    assert "6, 10, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)" in text
    assert "density=0." in text


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 4))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_follows_masked_conv2d_and_keeps_the_masks(sparse, optimizer):
    model = sparsify(small_model(), density=0.3, sparse=sparse)
    assert [type(model[i]) for i in (0, 2)] == [SparseConv2d if sparse else MaskedConv2d] * 2
    densities = check_masks(model)
    steps = optimizer(model.parameters(), lr=1e-2)
    x, y = torch.randn(20, 3, 8, 8), torch.randint(4, (20,))
    losses = []
    with prefer("sparse"):
        for _ in range(8):
            steps.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            steps.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert check_masks(model) == densities
    exact = densify(copy.deepcopy(model))
    assert_near(exact(x), model(x))
    assert [type(exact[i]) for i in (0, 2)] == [nn.Conv2d] * 2


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(5, 4, 8, 8), "Expected an input .batch, 6, height, width."),
        (torch.randn(6, 8), "Got shape"),
        (torch.randn(5, 6, 8, 8, dtype=torch.float64), "weight's dtype"),
        (torch.randn(5, 6, 2, 8), "at least 3 pixels"),
        ("image", "torch.Tensor"),
    ],
    ids=["channels", "dimensions", "dtype", "too small", "type"],
)
def test_inputs_that_do_not_fit_are_refused(kind, x, message):
    with pytest.raises(InitPerfError, match=message):
        layer_of(kind)(x)


def test_masks_that_do_not_fit_are_refused(kind):
    with pytest.raises(InitPerfError, match="shape"):
        kind(6, 10, 3, mask=torch.ones(10, 6, 3, dtype=torch.bool))
    with pytest.raises(InitPerfError, match="dtype bool"):
        kind(6, 10, 3, mask=torch.ones(10, 6, 3, 3))


def test_the_choice_needs_density_lanes_and_a_kernel_that_can():
    ours = {"kind": "masked_conv2d", "batch": 60, "out": (16, 16), "shape": (128, 128, 3, 3), "nnz": 14746}
    ours |= {"dtype": torch.float32, "device": "cpu", "stride": (1, 1)}

    def pays(**given):
        return conv_pays(**{**ours, **given})

    assert pays()
    assert not pays(nnz=140_000)
    assert not pays(batch=1)
    assert not pays(dtype=torch.float64)
    assert not pays(device="cuda")
    assert not pays(kind="masked_conv2d_grad_input", stride=(2, 2))


class Copied(nn.Module):
    """A parametrization whose result is not the Parameter itself."""

    def forward(self, weight):
        return weight.clone()


@pytest.mark.parametrize("parametrized", [False, True])
def test_a_weight_that_is_not_the_layers_own_parameter_is_masked_in_values_and_gradients(path, parametrized):
    layer, x, free = layer_of(MaskedConv2d, padding=1), torch.randn(16, 6, 8, 8), torch.randn(10, 6, 3, 3)
    twin, mask = layer.to_conv(), layer.weight_mask
    twin.weight.data = free * mask
    y, dx, dw, _ = of_convolution(twin, x, of_squares(of_convolution(twin, x)[0]))
    own = x.clone().requires_grad_()
    if parametrized:
        parametrize.register_parametrization(layer, "weight", Copied())
        with torch.no_grad():
            layer.parametrizations.weight.original.copy_(free)
        free, got = layer.parametrizations.weight.original, layer(own)
    else:
        got = torch.func.functional_call(layer, {"weight": free.requires_grad_()}, (own,))
    got.square().sum().backward()
    for ours, right in ((got, y), (own.grad, dx), (free.grad, dw.where(mask))):
        assert_close_to_exact(ours, right)


def test_a_second_derivative_along_pruned_weights_is_zero(path):
    layer = layer_of(MaskedConv2d, padding=1)
    x, along = torch.randn(16, 6, 8, 8, requires_grad=True), torch.randn(10, 6, 3, 3)
    found = []
    for direction in (along, along * layer.weight_mask):
        (dw,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        found.append(torch.autograd.grad((dw * direction).sum(), (x, layer.weight)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_seed_gives_survivors_the_values_they_have_in_the_dense_layer():
    layers = []
    for kind in (MaskedConv2d, SparseConv2d):
        layer = layer_of(kind)
        torch.manual_seed(5)
        layer.reset_parameters()
        layers.append(layer.to_conv())
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].bias, layers[1].bias)
    assert layers[0].weight.abs().max() <= (6 * 9) ** -0.5


@pytest.mark.parametrize("kind", KINDS)
def test_many_gradients_at_once(kind, path):
    layer = kind(3, 5, 3, mask=torch.rand(5, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4)
    x, dy = torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(4, 2, 5, 4, 4)
    inputs = (x, *layer.parameters())
    y = layer(x)
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    for i in range(4):
        for one, many in zip(torch.autograd.grad(y, inputs, dy[i], retain_graph=True), found, strict=True):
            assert_near(many[i], one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda t: t[:1].clone()])
def test_saved_tensors_that_come_back_otherwise_raise(kind, path, change):
    layer = kind(4, 5, 3, mask=torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: t, lambda t: change(t) if t.is_floating_point() else t):
        y = layer(x)
        with pytest.raises((RuntimeError, TypeError)):
            y.sum().backward()
