"""torch.compile sees a masked layer as one op."""

import copy

import pytest
import torch
from torch import nn

from initperf.layers.convert import densify, sparsify
from initperf.layers.linear import MaskedLinear, SparseLinear
from tolerance import assert_close_to_exact, linear, of_network, of_squares

pytest.importorskip("numba")


def outputs_of(model, x):
    """What the dense network of the same parameters gives."""
    return of_network(densify(copy.deepcopy(model)), x)[0]


def check_step(model, x, backend):
    """Compiled, a step gives what the dense network's formulas do."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    y = compiled(x)
    y.square().sum().backward()
    dense = densify(copy.deepcopy(model))
    right, _, *gradients = of_network(dense, x, of_squares(outputs_of(model, x)))
    assert_close_to_exact(y, right)
    for layer, (dw, db) in zip((model[0], model[2]), (gradients[:2], gradients[2:]), strict=True):
        mask = layer.weight_mask
        if isinstance(layer, SparseLinear):
            assert_close_to_exact(layer.weight_values.grad, dw.at(lambda t, mask=mask: t[mask][:, None]))
        else:
            assert_close_to_exact(layer.weight.grad, dw.where(mask))
        assert_close_to_exact(layer.bias.grad, db)


def model_and_input():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10)), density=0.1)
    return model, torch.randn(32, 200)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step(backend):
    check_step(*model_and_input(), backend)


def test_any_batch_and_leading_dimensions_compile_in_one_graph():
    model, _ = model_and_input()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 200), (7, 200), (2, 3, 200)):
        x = torch.randn(shape)
        assert_close_to_exact(compiled(x), outputs_of(model, x))


def test_a_new_mask_reaches_the_compiled_layer():
    torch._dynamo.reset()
    layer = MaskedLinear(200, 150, mask=torch.rand(150, 200) < 0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 200)
    for density in (0.1, 0.05, 0.9):
        layer.set_mask(torch.rand(150, 200) < density)
        layer.reset_parameters()
        assert_close_to_exact(compiled(x), linear(x, layer.to_linear().weight, layer.bias))


def test_autocast_inside_a_compiled_function_lowers_the_layer():
    model, x = model_and_input()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    assert run(x).dtype == torch.bfloat16


def test_export_keeps_the_op():
    model, x = model_and_input()
    program = torch.export.export(model, (x,))
    assert any("masked_linear" in str(node.target) for node in program.graph.nodes)
    assert_close_to_exact(program.module()(x), outputs_of(model, x))


def compressed():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    return sparsify(model, density=0.1, sparse=True), torch.randn(32, 200)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_of_compressed_layers(backend):
    check_step(*compressed(), backend)


def test_compressed_layers_compile_for_any_batch_take_new_masks_and_export():
    model, x = compressed()
    program = torch.export.export(model, (x,))
    assert any("sparse_linear" in str(node.target) for node in program.graph.nodes)
    assert_close_to_exact(program.module()(x), outputs_of(model, x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 200), (7, 200), (2, 3, 200)):
        x = torch.randn(shape)
        assert_close_to_exact(compiled(x), outputs_of(model, x))
    for density in (0.1, 0.05, 0.9):
        model[0].set_mask(torch.rand(150, 200) < density)
        model[0].reset_parameters()
        assert_close_to_exact(compiled(x), outputs_of(model, x))
