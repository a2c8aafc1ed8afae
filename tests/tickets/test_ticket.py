"""Tickets: a seed and one bit a weight give back the same bits, anything damaged is named, nothing is half done."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from initperf.cli.inspect import tables
from initperf.core.checks import InitPerfError
from initperf.experiments.networks import mlp, network
from initperf.init import initialize
from initperf.init.schemes import Init
from initperf.layers.convert import sparsify
from initperf.prune import magnitude
from initperf.ticket import Ticket
from tolerance import bits

SEED = 2**63 + 12345


def lenet(fraction=0.9, seed=SEED):
    """LeNet-300-100, initialized, and the ticket that keeps 1 - fraction of its weights."""
    model = mlp(784, (300, 100), 10)
    inits = initialize(model, "xavier_normal", seed=seed)
    masks = magnitude({n: p for n, p in model.named_parameters() if n.endswith("weight")}, fraction)
    return model, masks, Ticket.from_model(model, masks=masks, seed=seed, inits=inits, recipe={"recipe": "lenet-paper"})


def test_a_saved_ticket_applies_to_a_fresh_model_to_the_same_bits(tmp_path):
    model, masks, ticket = lenet()
    fresh = mlp(784, (300, 100), 10)
    Ticket.load(ticket.save(tmp_path / "t.safetensors")).apply(fresh)
    for name, parameter in fresh.named_parameters():
        expected = dict(model.named_parameters())[name]
        if name in masks:
            expected = expected.masked_fill(~masks[name], 0)
        assert torch.equal(bits(parameter), bits(expected)), name
    assert fresh.fc1.weight_mask.equal(masks["fc1.weight"])


def test_a_ticket_survives_the_file_whole(tmp_path):
    _, masks, ticket = lenet()
    again = Ticket.load(ticket.save(tmp_path / "t.safetensors"))
    assert again.parameters == ticket.parameters
    assert (again.seed, again.sha256, again.recipe) == (SEED, ticket.sha256, {"recipe": "lenet-paper"})
    assert all(torch.equal(again.masks[n], m) for n, m in masks.items())
    assert again.values == {}
    assert again.to_bytes() == ticket.to_bytes()


def test_masks_are_packed_row_major_lowest_bit_first_and_the_file_is_plain_safetensors(tmp_path):
    _, masks, ticket = lenet()
    stored = load_file(ticket.save(tmp_path / "t.safetensors"))
    assert sorted(stored) == ["fc1.weight.mask_bits", "fc2.weight.mask_bits", "fc3.weight.mask_bits"]
    packed = stored["fc3.weight.mask_bits"].numpy()
    flat = masks["fc3.weight"].flatten().tolist()
    assert [bool(packed[i // 8] >> (i % 8) & 1) for i in range(1000)] == flat


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.964, 1.0])
def test_a_lenet_ticket_takes_a_thirtieth_of_the_dense_checkpoint_at_any_level(tmp_path, fraction):
    model, _, ticket = lenet(fraction)
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    size = ticket.save(tmp_path / "t.safetensors").stat().st_size
    assert size * 30 <= (tmp_path / "dense.safetensors").stat().st_size


def test_a_model_not_initialized_by_us_keeps_its_survivors_values(tmp_path):
    model = mlp(20, (16,), 4)
    masks = magnitude({n: p for n, p in model.named_parameters() if n.endswith("weight")}, 0.75)
    ticket = Ticket.load(Ticket.from_model(model, masks=masks).save(tmp_path / "t.safetensors"))
    assert ticket.seed is None
    assert ticket.values["fc1.weight"].numel() == int(masks["fc1.weight"].sum())
    fresh = ticket.apply(mlp(20, (16,), 4))
    for name, parameter in model.named_parameters():
        expected = parameter.masked_fill(~masks[name], 0) if name in masks else parameter
        assert torch.equal(bits(fresh.get_parameter(name)), bits(expected)), name


def test_only_what_the_seed_does_not_give_back_is_stored(tmp_path):
    model = mlp(20, (16,), 4)
    inits = initialize(model, "xavier_normal", seed=5)
    with torch.no_grad():
        model.fc2.weight[0, 0] += 1
    ticket = Ticket.from_model(model, seed=5, inits=inits, weights=dict(model.named_parameters()))
    assert list(ticket.values) == ["fc2.weight"]
    fresh = ticket.apply(mlp(20, (16,), 4))
    assert torch.equal(bits(fresh.fc2.weight), bits(model.fc2.weight))
    assert torch.equal(bits(fresh.fc1.weight), bits(model.fc1.weight))


def test_a_trained_models_ticket_is_its_initial_weights():
    model = mlp(20, (16,), 4)
    inits = initialize(model, "xavier_normal", seed=5)
    first = model.fc1.weight.detach().clone()
    with torch.no_grad():
        model.fc1.weight.mul_(2)
    ticket = Ticket.from_model(model, seed=5, inits=inits)
    assert torch.equal(bits(ticket.weights()["fc1.weight"]), bits(first))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_come_back(tmp_path, dtype):
    model = mlp(20, (16,), 4).to(dtype)
    inits = initialize(model, "xavier_normal", seed=5)
    ticket = Ticket.load(Ticket.from_model(model, seed=5, inits=inits).save(tmp_path / "t"))
    assert ticket.values == {}
    fresh = ticket.apply(mlp(20, (16,), 4).to(dtype))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_every_init_function_comes_back(tmp_path):
    inits = {
        "fc1.weight": Init("uniform", (-0.5, 0.25)),
        "fc1.bias": Init("constant", (0.125,)),
        "fc2.weight": Init("trunc_normal", (0.0, 0.02, -0.04, 0.04)),
        "fc2.bias": Init("normal", (0.1, 0.3)),
    }
    weights = Ticket.load(Ticket.from_model(mlp(50, (40,), 30), seed=1, inits=inits).save(tmp_path / "t")).weights()
    assert -0.5 <= float(weights["fc1.weight"].min()) < -0.4
    assert 0.2 < float(weights["fc1.weight"].max()) < 0.25
    assert float(weights["fc2.weight"].abs().max()) <= 0.04
    assert weights["fc1.bias"].unique().tolist() == [0.125]
    assert 0.2 < float(weights["fc2.bias"].std()) < 0.4


def test_wrapped_models_and_plain_ones_share_tickets():
    wrapped = nn.Sequential()
    wrapped.add_module("module", mlp(20, (16,), 4))
    initialize(wrapped, "xavier_normal", seed=5)
    _, plain = initialize(model := mlp(20, (16,), 4), "xavier_normal", seed=5), model
    assert torch.equal(bits(wrapped.module.fc1.weight), bits(plain.fc1.weight))
    ticket = Ticket.from_model(wrapped)
    assert torch.equal(bits(ticket.apply(mlp(20, (16,), 4)).fc1.weight), bits(plain.fc1.weight))


def test_export_is_a_plain_checkpoint_with_zeros(tmp_path):
    model, masks, ticket = lenet()
    plain = mlp(784, (300, 100), 10)
    plain.load_state_dict(load_file(ticket.export(tmp_path / "dense.safetensors")), strict=True)
    assert torch.equal(bits(plain.fc1.weight), bits(model.fc1.weight.masked_fill(~masks["fc1.weight"], 0)))


def test_export_of_a_trained_network_has_its_values(tmp_path):
    _, masks, ticket = lenet()
    trained = ticket.apply(mlp(784, (300, 100), 10))
    with torch.no_grad():
        trained.fc1.weight.mul_(3)
        trained.fc3.bias.fill_(7)
    plain = mlp(784, (300, 100), 10)
    plain.load_state_dict(load_file(ticket.export(tmp_path / "dense.safetensors", trained)), strict=True)
    assert torch.equal(bits(plain.fc1.weight), bits(trained.fc1.weight))
    assert (plain.fc3.bias == 7).all()


def test_every_truncation_of_the_file_is_named(tmp_path):
    data = lenet()[2].to_bytes()
    for size in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "t").write_bytes(data[:size])
        with pytest.raises(InitPerfError, match="a ticket"):
            Ticket.load(tmp_path / "t")


def test_every_flipped_bit_is_found(tmp_path):
    model = mlp(6, (5,), 3)
    inits = initialize(model, "xavier_normal", seed=5)
    masks = magnitude({n: p for n, p in model.named_parameters() if n.endswith("weight")}, 0.5)
    data = Ticket.from_model(model, masks=masks, seed=5, inits=inits, recipe={"data": "digits"}).to_bytes()
    right = Ticket.load(write(tmp_path / "t", data))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        try:
            found = Ticket.load(write(tmp_path / "t", bytes(damaged)))
        except InitPerfError:
            continue
        assert found.to_bytes() == right.to_bytes(), f"byte {at}: another ticket, unnoticed"


def write(path, data):
    path.write_bytes(data)
    return path


def test_foreign_and_missing_files_are_named(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    torch.save({"a": 1}, tmp_path / "torch.pt")
    for name, message in (
        ("plain.safetensors", "metadata key"),
        ("torch.pt", "safetensors"),
        ("nothing", "no such file"),
    ):
        with pytest.raises(InitPerfError, match=message):
            Ticket.load(tmp_path / name)


def test_a_changed_seed_is_caught_by_the_hash(tmp_path):
    _, _, ticket = lenet()
    forged = Ticket(ticket.parameters, ticket.masks, ticket.sha256, SEED + 1)
    model = mlp(784, (300, 100), 10)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InitPerfError, match="SHA-256"):
        forged.apply(model)
    assert type(model.fc1) is nn.Linear
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(784, (301, 100), 10), r"fc1.bias to have shape \(300,\)"),
        (mlp(784, (300,), 10), "one without fc3"),
        (mlp(784, (300, 100, 50), 10), "with fc4"),
        (mlp(784, (300, 100), 10).double(), "dtype torch.float32"),
    ],
)
def test_a_model_that_does_not_fit_is_not_touched(model, message):
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InitPerfError, match=message):
        lenet()[2].apply(model)
    assert type(model.fc1) is nn.Linear
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(before, model.parameters(), strict=True))


def test_from_model_checks_masks():
    model = mlp(20, (16,), 4)
    with pytest.raises(InitPerfError, match="shape"):
        Ticket.from_model(model, masks={"fc1.weight": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(InitPerfError, match="masks of parameters"):
        Ticket.from_model(model, masks={"fc9.weight": torch.ones(3, dtype=torch.bool)})


def test_masks_of_masked_layers_are_found():
    _, masks, ticket = lenet()
    model = ticket.apply(mlp(784, (300, 100), 10))
    again = Ticket.from_model(model)
    assert all(torch.equal(again.masks[n], m) for n, m in masks.items())
    assert again.density == pytest.approx(0.1, abs=1e-4)


def test_the_hash_is_over_sorted_names_and_little_endian_bytes():
    import hashlib

    model, _, ticket = lenet()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().astype("<f4").tobytes())
    assert ticket.sha256 == digest.hexdigest()


def test_metadata_is_json_without_code(tmp_path):
    data = lenet()[2].to_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["initperf"])
    assert about["seed"] == SEED
    assert about["parameters"]["fc1.weight"]["init"] == "normal"
    assert np.float32(about["parameters"]["fc1.weight"]["args"][1]) == np.float32((2 / 1084) ** 0.5)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises(InitPerfError, match="can be written"):
        lenet()[2].save(tmp_path / "absent" / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seeded", [True, False])
def test_a_ticket_of_compressed_layers_is_that_of_masked_ones_and_applies_to_either(seeded, tmp_path):
    def model(sparse):
        net = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
        inits = initialize(net, "kaiming_normal", seed=7)
        sparsify(net, masks, sparse=sparse)
        return net, inits if seeded else None

    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(shape, generator=generator) < 0.3
        for name, shape in (("0.weight", (33, 20)), ("2.weight", (5, 33)))
    }
    (masked, inits), (compressed, _) = model(False), model(True)
    expected, ticket = Ticket.from_model(masked, inits=inits), Ticket.from_model(compressed, inits=inits)
    assert ticket.sha256 == expected.sha256
    assert all(torch.equal(ticket.masks[name], mask) for name, mask in masks.items())
    path = ticket.save(tmp_path / "t.safetensors")
    for sparse in (False, True):
        fresh = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
        sparsify(fresh, {name: torch.ones_like(mask) for name, mask in masks.items()}, sparse=sparse)
        applied = Ticket.load(path).apply(fresh)
        for name, layer in (("0", applied[0]), ("2", applied[2])):
            assert type(layer).__name__ == ("SparseLinear" if sparse else "MaskedLinear")
            dense = layer.to_dense().weight
            assert torch.equal(dense, masked.get_submodule(name).weight)


class Normed(nn.Module):
    """A convolution, its norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


def normed(sparse=None):
    """Trained a little from its ticket, and that ticket, which holds values and statistics as after rewinding."""
    model = Normed()
    model(torch.randn(20, 1, 4, 4))  # moves the running statistics
    weights = {"conv.weight": model.conv.weight, "fc.weight": model.fc.weight}
    ticket = Ticket.from_model(model, masks=magnitude(weights, 0.5), buffers=dict(model.named_buffers()))
    if sparse is not None:
        sparsify(model, ticket.masks, sparse=sparse)
        model(torch.randn(20, 1, 4, 4)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model, ticket


LOADING = """
import sys
sys.modules["initperf"] = None  # importing it raises
import torch
from torch import nn
from safetensors.torch import load_file
conv, norm, fc = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3)
model = nn.ModuleDict({"conv": conv, "norm": norm, "fc": fc})
model.load_state_dict(load_file(sys.argv[1]), strict=True)
model.eval()
x = torch.load(sys.argv[2])
print((fc.weight == 0).sum().item(), (conv.weight == 0).sum().item())
torch.save(fc(norm(conv(x)).relu().flatten(1)), sys.argv[2])
"""


@pytest.mark.parametrize("trained", [None, False, True], ids=["untrained", "masked", "compressed"])
def test_an_exported_checkpoint_loads_in_plain_torch_and_gives_the_same_outputs(tmp_path, trained):
    model, ticket = normed(trained)
    if trained is None:
        ticket.apply(model)
        ticket.export(tmp_path / "dense.safetensors")
    else:
        ticket.export(tmp_path / "dense.safetensors", model)
    x = torch.randn(5, 1, 4, 4)
    torch.save(x, tmp_path / "x.pt")
    arguments = [sys.executable, "-c", LOADING, str(tmp_path / "dense.safetensors"), str(tmp_path / "x.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.returncode) == (["24", "18"], 0), done.stderr
    expected = model.eval()(x)
    torch.testing.assert_close(torch.load(tmp_path / "x.pt"), expected, rtol=1e-5, atol=1e-6)


def test_statistics_of_a_rewound_model_travel_in_the_file_and_inspect_shows_them(tmp_path):
    model, ticket = normed()
    path = ticket.save(tmp_path / "t.safetensors")
    again = Ticket.load(path)
    assert again.to_bytes() == ticket.to_bytes()
    fresh = again.apply(Normed())
    for name, buffer in model.named_buffers():
        assert torch.equal(fresh.get_buffer(name), buffer)
    rows = {row[0]: row for row in tables(path)[0][0].rows}
    assert rows["norm.running_var"][1:3] == ["4", "float32"]
    assert rows["conv.weight"][1] == "4 x 1 x 3 x 3"
    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    with pytest.raises(InitPerfError):
        Ticket.load(write(tmp_path / "damaged", bytes(damaged)))
    wider = Normed()
    wider.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(InitPerfError, match="norm.running_mean"):
        again.apply(wider)
    assert type(wider.conv) is nn.Conv2d


def test_a_ticket_of_convolutions_comes_back_from_its_seed_in_a_thirtieth(tmp_path):
    model = network((3, 32, 32), (64, 64), (256, 256), 10)
    inits = initialize(model, "xavier_normal", seed=SEED)
    masks = magnitude({n: p for n, p in model.named_parameters() if n.endswith("weight")}, 0.9)
    path = Ticket.from_model(model, masks=masks, inits=inits).save(tmp_path / "t.safetensors")
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    assert 30 * path.stat().st_size <= (tmp_path / "dense.safetensors").stat().st_size
    fresh = Ticket.load(path).apply(network((3, 32, 32), (64, 64), (256, 256), 10))
    for name, mask in masks.items():
        assert torch.equal(bits(fresh.get_parameter(name)), bits(model.get_parameter(name).masked_fill(~mask, 0)))
