"""Real models turn into masked and compressed ones, train, and come back."""

import importlib

import pytest
import torch
from torch import nn

import processes
from initperf.core.checks import InitPerfError
from initperf.layers.convert import check_masks, densify, masked_layers, sparse_layers, sparsify
from initperf.layers.linear import MaskedLinear, SparseLinear

pytest.importorskip("numba")

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES = {
    "Bert": ("ForSequenceClassification", {**WIDTH, "vocab_size": 100, "num_labels": 5}),
    "ViT": ("ForImageClassification", {**WIDTH, "image_size": 32, "patch_size": 8, "num_labels": 5}),
    "ResNet": (
        "ForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 5},
    ),
    "GPT2": ("LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100}),
}


def transformer(family):
    transformers = pytest.importorskip("transformers")
    kind, settings = FAMILIES[family]
    config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(importlib.import_module("transformers"), f"{family}{kind}")(config)
    if family in ("Bert", "GPT2"):
        return model.eval(), {"input_ids": torch.arange(24).view(2, 12) % 100}
    return model.eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}


def linears(model):
    return {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("family", ["Bert", "ViT", "ResNet"])
def test_models_of_transformers_convert_train_and_come_back(family, sparse):
    model, inputs = transformer(family)
    parameters, names = list(model.parameters()), list(linears(model))
    assert names
    assert sparsify(model, density=dict.fromkeys(names, 0.3), sparse=sparse) is model
    found = sparse_layers(model) if sparse else masked_layers(model)
    assert {f"{name}.weight" for name in found} == set(names)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**inputs).logits.square().sum()
        loss.backward()
        optimizer.step()
    densities = check_masks(model)
    assert all(abs(density - 0.3) < 0.01 for density in densities.values())
    output = model(**inputs).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    densify(model)
    assert set(linears(model)) == set(names)
    assert all(type(layer) is nn.Linear for layer in linears(model).values())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    torch.testing.assert_close(model(**inputs).logits, output)
    again, _ = transformer(family)
    sparsify(again, density=dict.fromkeys(names, 0.5), sparse=not sparse)
    again.load_state_dict(state)
    torch.testing.assert_close(again(**inputs).logits, output)


def test_conv1d_layers_of_gpt2_are_named_and_stay_dense():
    model, _ = transformer("GPT2")
    name = "transformer.h.0.attn.c_attn.weight"
    mask = torch.ones(32, 96, dtype=torch.bool)
    with pytest.raises(InitPerfError, match="'transformer.h.0.attn.c_attn.weight', of a Conv1D"):
        sparsify(model, {name: mask})
    with pytest.raises(InitPerfError, match="tied weights transformer.wte.weight = lm_head.weight"):
        sparsify(model, density=0.1)
    with pytest.raises(InitPerfError, match="Conv1D"):
        sparsify(model.transformer.h, density=0.1)
    assert not check_masks(model)


def test_an_output_layer_tied_to_the_embedding_is_refused_and_the_rest_converts():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**FAMILIES["Bert"][1]))
    head = "cls.predictions.decoder.weight"
    for sparse in (False, True):
        with pytest.raises(InitPerfError, match="tied weights"):
            sparsify(model, {head: torch.ones(100, 32, dtype=torch.bool)}, sparse=sparse)
    sparsify(model, density={"bert.encoder.*.weight": 0.1}, sparse=True)
    assert len(check_masks(model)) == 12
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_storage_changes_only_when_it_is_asked_for():
    model = sparsify(mlp(), density=0.5)
    assert [type(m) for m in model] == [MaskedLinear, nn.ReLU, MaskedLinear]
    sparsify(model, density={"0.weight": 0.4}, sparse=True)
    assert [type(m) for m in model] == [SparseLinear, nn.ReLU, MaskedLinear]
    parameter = model[0].weight_values
    sparsify(model, density=0.25)
    assert [type(m) for m in model] == [SparseLinear, nn.ReLU, MaskedLinear]
    assert model[0].weight_values is parameter
    assert check_masks(model) == {"0": 0.25, "2": 0.25}
    weight = model[0].to_dense().weight.detach()
    sparsify(model, {"0.weight_values": model[0].weight_mask}, sparse=False)
    assert type(model[0]) is MaskedLinear
    assert torch.equal(model[0].weight, weight)
    assert model[0].weight is parameter


def test_what_was_made_before_the_conversion_goes_on_working():
    model, x = mlp(), torch.randn(5, 8)
    optimizer, seen = torch.optim.Adam(model.parameters()), []
    model[0].register_forward_hook(lambda *args: seen.append("module"))
    model[0].weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    loss = model(x).sum()  # kept alive: its graph knows the dense shape
    loss.backward()
    dense = model[0].weight.grad.clone()
    sparsify(model, density=0.25, sparse=True)
    assert torch.equal(model[0].weight_values.grad.flatten(), dense[model[0].weight_mask])
    optimizer.step()
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
    assert seen == ["module", (16, 8), "module", (32, 1)]
    assert optimizer.state[model[0].weight_values]["exp_avg"].shape == (32, 1)
    densify(model)
    optimizer.zero_grad()
    model(x).sum().backward()
    assert model[0].weight.grad.shape == (16, 8)


def test_layers_whose_weight_others_read_are_refused():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mask = torch.rand(16, 8) < 0.5
    with pytest.raises(InitPerfError, match="reads itself"):
        sparsify(encoder, {"linear1.weight": mask}, sparse=True)
    assert type(encoder.linear1) is nn.Linear
    sparsify(encoder, {"linear1.weight": mask})
    encoder.eval()(torch.randn(2, 3, 8))
    with pytest.raises(InitPerfError, match=r"self_attn .nn.MultiheadAttention. reads itself"):
        sparsify(encoder, {"self_attn.out_proj.weight": torch.ones(8, 8, dtype=torch.bool)})


@pytest.mark.parametrize("arguments", [{"density": 0.5}, {"density": 0.5, "sparse": True}])
def test_an_optimizer_of_other_parameters_is_refused_and_nothing_changes(arguments):
    model = mlp()
    with pytest.raises(InitPerfError, match="at least one"):
        sparsify(model, **arguments, optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Optimizer"):
        sparsify(model, **arguments, optimizer=3)
    assert type(model[0]) is nn.Linear


def batches(steps):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 8, generator=generator) for _ in range(steps)]


def target(model, x):
    return nn.functional.mse_loss(model(x), x[:, :4])


def rank(number, sparse):
    """One process of two: trains on its half of every batch."""
    model = sparsify(mlp(), density=0.25, sparse=sparse)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    indices = []
    for x in batches(5):
        optimizer.zero_grad()
        target(wrapped, x[4 * number : 4 * number + 4]).backward()
        optimizer.step()
        indices.append(id(model[0]._pattern))
    check_masks(model, group=torch.distributed.group.WORLD)
    caught = ""
    if number:
        model[2].set_mask(model[2].weight_mask.roll(1, 0))
    try:
        check_masks(model, group=torch.distributed.group.WORLD)
    except InitPerfError as error:
        caught = str(error)
    return densify(model)[0].weight, len(set(indices[1:])), caught


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("sparse", [False, True])
def test_two_processes_train_as_one_and_their_masks_are_compared_by_hash(sparse, tmp_path):
    found = processes.run(rank, tmp_path, sparse)
    model = sparsify(mlp(), density=0.25, sparse=sparse)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for x in batches(5):
        optimizer.zero_grad()
        target(model, x).backward()
        optimizer.step()
    expected = densify(model)[0].weight
    for weight, indices, caught in found:
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-4)
        assert indices == 1, "the index was built again, though the mask stayed"
        assert "different ones for 2" in caught


@pytest.mark.parametrize("sparse", [False, True])
def test_a_mask_without_data_changes_nothing(sparse):
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4))
    before, x = [p.clone() for p in model.parameters()], torch.randn(2, 8)
    want = model(x)
    masks = {"0.weight": torch.zeros(5, 8, dtype=torch.bool), "2.weight": torch.ones(4, 5).bool().to("meta")}
    with pytest.raises(InitPerfError, match="meta"):
        sparsify(model, masks=masks, sparse=sparse)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model(x), want)
    sparsify(model, density=0.5, sparse=sparse)
    want = model(x)
    with pytest.raises(InitPerfError, match="meta"):
        model[2].set_mask(masks["2.weight"])
    assert torch.equal(model(x), want)
    for kind in (MaskedLinear, SparseLinear):
        with pytest.raises(InitPerfError, match="meta"):
            kind.from_linear(nn.Linear(8, 5), masks["0.weight"].to("meta"))


def test_densities_need_data():
    with pytest.raises(InitPerfError, match="with data"):
        sparsify(nn.Sequential(nn.Linear(8, 5, device="meta")), density=0.5)


@pytest.mark.parametrize("kind", [MaskedLinear, SparseLinear])
def test_the_mask_that_is_there_already(kind):
    """Nothing is built again, but a weight that was written past its mask obeys again."""
    layer = kind(40, 30, mask=torch.rand(30, 40) < 0.5)
    pattern, before = layer._pattern, layer.to_dense().weight.clone()
    if kind is MaskedLinear:
        layer.weight.data.add_((~layer.weight_mask).float())
    layer.set_mask(layer.weight_mask.clone())
    assert layer._pattern is pattern
    assert torch.equal(layer.to_dense().weight, before)
    layer.set_mask(~layer.weight_mask)
    assert layer._pattern is not pattern


def test_check_masks_wants_a_module():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        check_masks("model")


def test_from_masked_names_the_class_that_it_wants():
    with pytest.raises(TypeError, match="to be an MaskedLinear"):
        SparseLinear.from_masked(nn.Linear(3, 4))
