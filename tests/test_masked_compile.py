"""torch.compile sees a masked layer as one op."""

import copy

import pytest
import torch
from torch import nn

from initperf.convert import densify, sparsify
from initperf.masked import MaskedLinear

pytest.importorskip("numba")


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


def model_and_input():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = sparsify(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10)), density=0.1)
    return model, torch.randn(32, 200)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step_equals_the_eager_one(backend):
    model, x = model_and_input()
    expected = step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    for got, want in zip([y.detach(), *(p.grad for p in model.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_any_batch_and_leading_dimensions_compile_in_one_graph():
    model, _ = model_and_input()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 200), (7, 200), (2, 3, 200)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))


def test_a_new_mask_reaches_the_compiled_layer():
    torch._dynamo.reset()
    layer = MaskedLinear(200, 150, mask=torch.rand(150, 200) < 0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 200)
    for density in (0.1, 0.05, 0.9):
        layer.set_mask(torch.rand(150, 200) < density)
        layer.reset_parameters()
        torch.testing.assert_close(compiled(x), layer.to_linear()(x))


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
    torch.testing.assert_close(program.module()(x), model(x))


def compressed():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    return sparsify(model, density=0.1, sparse=True), torch.randn(32, 200)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_of_compressed_layers_equals_the_eager_one(backend):
    model, x = compressed()
    expected = step(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model.zero_grad()
    y = compiled(x)
    y.square().sum().backward()
    for got, want in zip([y.detach(), *(p.grad for p in model.parameters())], expected, strict=True):
        torch.testing.assert_close(got, want)


def test_compressed_layers_compile_for_any_batch_take_new_masks_and_export():
    model, x = compressed()
    program = torch.export.export(model, (x,))
    assert any("sparse_linear" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 200), (7, 200), (2, 3, 200)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), model(x))
    for density in (0.1, 0.05, 0.9):
        model[0].set_mask(torch.rand(150, 200) < density)
        model[0].reset_parameters()
        torch.testing.assert_close(compiled(x), densify(copy.deepcopy(model))(x))
