"""What initperf does on a device that it has no kernels for (fake_device.py). tests/project/test_devices.py runs this in a process of its own."""

import copy
import logging

import pytest
import torch
from torch import nn

import fake_device
import initperf
from fake_device import DEVICE, NAME
from initperf import (
    MaskedConv2d,
    MaskedLinear,
    SparseConv2d,
    SparseLinear,
    Ticket,
    TicketSearch,
    VarianceMonitor,
    check_init,
    check_masks,
    densify,
    describe,
    init,
    mask_optimizer_,
    moments,
    ops,
    prune,
    rng,
    sparsify,
)
from initperf.core.checks import InitPerfError
from initperf.kernels.reference.precision import widest
from initperf.layers.choice.calibrate import pack_bits
from initperf.saliency import prune_at_start
from initperf.tickets.criteria import CRITERIA, masks_by, movement
from tolerance import bits

NARROW = (torch.float32, torch.bfloat16, torch.float16)
GENERATOR = torch.Generator().manual_seed(0)
MASK = torch.rand(20, 30, generator=GENERATOR) < 0.3
FILTERS = torch.rand(6, 4, 3, 3, generator=GENERATOR) < 0.4
X, IMAGES = torch.randn(8, 30, generator=GENERATOR), torch.randn(5, 4, 7, 8, generator=GENERATOR)
FUNCTIONS = {
    "uniform_": (-0.3, 0.7),
    "normal_": (0.1, 0.5),
    "trunc_normal_": (0.0, 1.0, -0.5, 2.0),
    "xavier_uniform_": (),
    "xavier_normal_": (),
    "kaiming_uniform_": (),
    "kaiming_normal_": (),
    "orthogonal_": (1.5,),
    "sparse_": (0.4,),
}


@pytest.fixture(autouse=True, scope="session")
def told():
    """All warnings of the logger "initperf" in this process."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logging.getLogger("initperf").addHandler(handler)
    return records


def assert_same_bits(on_device, on_cpu):
    assert on_device.device.type == NAME
    assert torch.equal(bits(on_device.detach().cpu()), bits(on_cpu.detach()))


def mlp():
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))


def convolutional():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 6, 4))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_init_functions_give_the_cpus_bits(function, dtype):
    on_device, on_cpu = (torch.empty(33, 40, dtype=dtype, device=device) for device in (DEVICE, "cpu"))
    assert getattr(init, function)(on_device, *FUNCTIONS[function], seed=5) is on_device
    assert_same_bits(on_device, getattr(init, function)(on_cpu, *FUNCTIONS[function], seed=5))


def test_init_functions_follow_torchs_seed_and_take_any_strides():
    found = []
    for device in (DEVICE, "cpu"):
        torch.manual_seed(3)
        found.append(init.kaiming_normal_(torch.empty(40, 33, device=device).t()))
    assert_same_bits(*found)


def test_shards_and_survivors_are_those_of_the_cpu():
    normal = rng.normal(0, 1)
    parts = [torch.empty(5, 7, device=device) for device in (DEVICE, "cpu")]
    for part in parts:
        init.sample_shard_into(part, normal, (40, 30), (11, 3), seed=4, stream=9)
    assert_same_bits(*parts)
    whole = init.sample_into(torch.empty(20, 30), normal, seed=4)
    for mask in (MASK, pack_bits(MASK)):
        values = torch.empty(int(MASK.sum()), 1, device=DEVICE)
        init.sample_survivors_into(values, normal, mask.to(DEVICE), MASK.shape, seed=4)
        assert_same_bits(values, whole[MASK][:, None])


@pytest.mark.parametrize("rescale", [None, "layer", "unit", "squares"])
@pytest.mark.parametrize("scheme", [None, "kaiming_normal", "orthogonal"])
def test_initialize_gives_the_cpus_bits(scheme, rescale):
    if scheme == "orthogonal" and rescale == "layer":
        scheme = "xavier_uniform"
    models = [convolutional(), convolutional().to(DEVICE)]
    masks = {"0.weight": FILTERS, "4.weight": torch.rand(4, 180, generator=torch.Generator().manual_seed(1)) < 0.5}
    reports = [initperf.initialize(m, scheme, seed=7, masks=masks, rescale=rescale, stats=True) for m in models]
    for on_cpu, on_device in zip(models[0].parameters(), models[1].parameters(), strict=True):
        if rescale == "squares":  # the factor comes from moments in float32
            torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-5, atol=0)
        else:
            assert_same_bits(on_device, on_cpu)
    for a, b in zip(reports[0].records, reports[1].records, strict=True):
        assert b.measured == pytest.approx(a.measured, rel=1e-4, abs=1e-6)


def test_initialize_gives_a_model_of_the_meta_device_memory_here():
    with torch.device("meta"):
        model = mlp()
    initperf.initialize(model, seed=2, device=DEVICE)
    other = mlp()
    initperf.initialize(other, seed=2)
    for on_device, on_cpu in zip(model.parameters(), other.parameters(), strict=True):
        assert_same_bits(on_device, on_cpu)


def test_initialize_scales_by_what_it_measures():
    model = mlp().to(DEVICE)
    masks = {"0.weight": MASK.to(DEVICE)}
    initperf.initialize(model, "kaiming_normal", seed=1, masks=masks, rescale="measured", sample=X.to(DEVICE))
    dense = mlp()
    initperf.initialize(dense, "kaiming_normal", seed=1)
    wanted = (X @ dense[0].weight.t()).var(correction=0)
    torch.testing.assert_close((X.to(DEVICE) @ model[0].weight.t()).cpu().var(correction=0), wanted)


def test_fast_init_serves_constructors_here():
    with initperf.fast_init(seed=6):
        on_cpu = nn.Linear(30, 20)
    with initperf.fast_init(seed=6):
        on_device = nn.Linear(30, 20, device=DEVICE)
    assert_same_bits(on_device.weight, on_cpu.weight)


def layers():
    """Layers and their dense equals on the CPU: {name: (layer on the device, weight's mask, dense, input)}."""
    linear, conv = nn.Linear(30, 20), nn.Conv2d(4, 6, 3, padding=1, stride=2)
    with torch.no_grad():
        linear.weight.masked_fill_(~MASK, 0)
        conv.weight.masked_fill_(~FILTERS, 0)
    return {
        "MaskedLinear": (MaskedLinear.from_linear(copy.deepcopy(linear), MASK), MASK, linear, X),
        "SparseLinear": (SparseLinear.from_linear(linear, MASK), MASK, linear, X),
        "MaskedConv2d": (MaskedConv2d.from_conv(copy.deepcopy(conv), FILTERS), FILTERS, conv, IMAGES),
        "SparseConv2d": (SparseConv2d.from_conv(conv, FILTERS), FILTERS, conv, IMAGES),
    }


KINDS = list(layers())


def dense_gradient(layer):
    if isinstance(layer, (SparseLinear, SparseConv2d)):
        return layer.expand(layer.weight_values.grad).cpu()
    return layer.weight.grad.cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compute_what_dense_ones_do_forward_backward_and_in_steps(kind):
    layer, mask, dense, x = layers()[kind]
    layer.to(DEVICE)
    here, there = x.to(DEVICE).requires_grad_(), x.clone().requires_grad_()
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in (layer, dense)]
    for _ in range(3):
        y, expected = layer(here), dense(there)
        assert y.device.type == NAME
        torch.testing.assert_close(y.cpu(), expected)
        for optimizer in optimizers:
            optimizer.zero_grad()
        here.grad = there.grad = None
        y.square().sum().backward()
        expected.square().sum().backward()
        dense.weight.grad.masked_fill_(~mask, 0)
        torch.testing.assert_close(here.grad.cpu(), there.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dense_gradient(layer), dense.weight.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.bias.grad.cpu(), dense.bias.grad, rtol=1e-4, atol=1e-4)
        assert not bool(dense_gradient(layer)[~mask].any())
        for optimizer in optimizers:
            optimizer.step()
    assert check_masks(layer)[""] == pytest.approx(float(mask.float().mean()))
    with torch.no_grad():
        torch.testing.assert_close(layer(here).cpu(), dense(there), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_second_derivatives_and_go_through_torch_func(kind):
    layer, _, dense, x = layers()[kind]
    layer.to(DEVICE)
    found = []
    for model, at in ((layer, x.to(DEVICE)), (dense, x)):
        at = at.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(at).square().sum(), at, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), at)
        mapped = torch.func.vmap(lambda row, model=model: model(row[None])[0])(at.detach())
        found.append([v.detach().cpu() for v in (first, second, mapped)])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_under_autocast_and_in_narrow_dtypes(kind):
    layer, _, dense, x = layers()[kind]
    layer.to(DEVICE)
    with torch.autocast(NAME, dtype=torch.bfloat16):
        y = layer(x.to(DEVICE))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float().cpu(), dense(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    layer.bfloat16()
    assert layer(x.to(DEVICE).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_compiled_as_other_layers(kind):
    layer, _, dense, x = layers()[kind]
    layer.to(DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x.to(DEVICE))
    torch.testing.assert_close(y.detach().cpu(), dense(x).detach())
    y.sum().backward()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_model_is_sparsified_trained_saved_loaded_and_densified(sparse):
    model = convolutional().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = IMAGES.to(DEVICE)

    def step():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    sparsify(model, density={"0.weight": 0.5, "4.weight": 0.2}, sparse=sparse, optimizer=optimizer)
    mask_optimizer_(optimizer)
    first = step()
    for _ in range(5):
        last = step()
    assert last < first
    assert check_masks(model) == {"0": pytest.approx(0.5), "4": pytest.approx(0.2)}
    model[4].set_mask(torch.rand(4, 180) < 0.1)
    step()
    model.eval()
    with torch.no_grad():
        wanted = model(x).cpu()
    other = convolutional().to(DEVICE)
    sparsify(other, density={"0.weight": 0.7, "4.weight": 0.7}, sparse=sparse)
    other.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    torch.testing.assert_close(other.eval()(x).detach().cpu(), wanted)
    densify(model, optimizer=optimizer)
    with torch.no_grad():
        torch.testing.assert_close(model(x).cpu(), wanted)


def test_a_chain_of_compressed_layers_runs_layer_by_layer():
    model = mlp().to(DEVICE)
    sparsify(model, density=0.3, sparse=True)
    assert type(model).__name__ == "SparseSequential"
    y = model(X.to(DEVICE))
    y.sum().backward()
    dense = densify(copy.deepcopy(model)).to("cpu")
    torch.testing.assert_close(y.detach().cpu(), dense(X).detach())


WEIGHTS = {"a": torch.randn(30, 20, generator=GENERATOR), "b": torch.randn(50, generator=GENERATOR)}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_masks_are_those_of_the_cpu(scope, dtype):
    there = {n: w.to(dtype) for n, w in WEIGHTS.items()}
    here = {n: w.to(DEVICE) for n, w in there.items()}
    old = prune.random(there, 0.2, seed=1)
    for make in (
        lambda w, m: prune.magnitude(w, 0.6, masks=m, scope=scope),
        lambda w, m: prune.random(w, 0.6, seed=3, masks=m, scope=scope),
        lambda w, m: prune.by_score(w, 0.6, masks=m, scope=scope),
        lambda w, m: prune.shuffle(m, 3),
    ):
        expected = make(there, old)
        for name, mask in make(here, {n: m.to(DEVICE) for n, m in old.items()}).items():
            assert mask.device.type == NAME
            assert torch.equal(mask.cpu(), expected[name])
    with pytest.raises(InitPerfError, match="NaN"):
        prune.magnitude({"a": torch.full((3,), torch.nan, device=DEVICE)}, 0.5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_and_movement_are_those_of_the_cpu(criterion):
    final, initial = {"a": WEIGHTS["a"]}, {"a": WEIGHTS["a"].flip(0)}
    found = []
    for device in ("cpu", DEVICE):
        w, w0 = {"a": final["a"].to(device)}, {"a": initial["a"].to(device)}
        masks = masks_by(criterion, w, w0, 0.5, masks=None, scope="layerwise", seed=2)
        found.append((masks["a"].cpu(), movement(w["a"], w0["a"], None, masks["a"], seed=4)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_pruning_before_training_works_here(score):
    model = mlp()
    initperf.initialize(model, "kaiming_normal", seed=0)
    found = []
    for device in ("cpu", DEVICE):
        moved, batches = copy.deepcopy(model).to(device), [(X.to(device),)]
        masks = prune_at_start(score, moved, 0.5, batches=batches, loss=lambda m, b: m(b[0]).square().mean())
        assert all(m.device.type == torch.device(device).type for m in masks.values())
        found.append({n: m.cpu() for n, m in masks.items()})
    assert all(float((found[0][n] == found[1][n]).float().mean()) > 0.99 for n in found[0])  # sums in another order


HARD = {
    "plain": torch.randn(50, 40, generator=GENERATOR) * 3 + 100,
    "narrow": torch.randn(64, generator=GENERATOR).half(),
    "huge": torch.tensor([1e15, -1e15, 2e15, 0.0]),
    "tiny": torch.tensor([1e-30, -1e-30, 3e-30]),
    "zeros": torch.zeros(5),
    "equal": torch.full((7,), 0.1),
    "not finite": torch.tensor([1.0, torch.nan, 2.0, torch.inf, -1.0]),
    "nothing": torch.tensor([torch.nan]),
    "empty": torch.zeros(0),
}


@pytest.mark.parametrize("name", HARD)
def test_moments_are_float32_here_and_near_the_cpus(name):
    here, there = moments([HARD[name].to(DEVICE)]), moments([HARD[name]])
    assert here.mean.dtype == torch.float32
    for field in ("count", "nonfinite"):
        assert torch.equal(getattr(here, field).cpu(), getattr(there, field))
    for field in ("mean", "std", "skew", "kurtosis", "min", "max", "zeros"):
        got, expected = getattr(here, field).cpu().double(), getattr(there, field)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_moments_of_channels_and_of_strided_lists():
    here = moments([IMAGES.to(DEVICE), IMAGES.to(DEVICE).transpose(0, 1)[:, ::2]], dim=(0, 2))
    there = moments([IMAGES, IMAGES.transpose(0, 1)[:, ::2]], dim=(0, 2))
    torch.testing.assert_close(here.var.cpu().double(), there.var, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(here[1].raw(3).cpu().double(), there[1].raw(3), rtol=1e-3, atol=1e-3)


def test_the_monitor_reads_what_it_reads_on_the_cpu():
    found = []
    model = convolutional()
    initperf.initialize(model, "kaiming_normal", seed=3)
    for device in ("cpu", DEVICE):
        moved = copy.deepcopy(model).to(device)
        optimizer = torch.optim.SGD(moved.parameters(), lr=0.01)
        with VarianceMonitor(moved, costly_every=2) as monitor:
            for _ in range(3):
                optimizer.zero_grad()
                moved(IMAGES.to(device)).square().mean().backward()
                optimizer.step()
                monitor.step()
        found.append(monitor.scalars())
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def test_verdicts_and_descriptions_are_those_of_the_cpu():
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 4))
    initperf.initialize(model, "normal(0, 0.5)", seed=0)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected = check_init(model, x).faults, str(describe(model))
    assert expected[0]
    model.to(DEVICE)
    verdicts = check_init(model, x.to(DEVICE))
    assert fake_device.STATES == [[7]]
    assert verdicts.faults == expected[0]
    found, told = str(describe(model)).split(), expected[1].split()
    assert [w for w in found if w[:1].isalpha()] == [w for w in told if w[:1].isalpha()]


@pytest.mark.parametrize("sparse", [False, True])
def test_a_ticket_comes_from_a_model_here_and_goes_back_to_it(sparse, tmp_path):
    model = convolutional().to(DEVICE)
    inits = initperf.initialize(model, "kaiming_normal", seed=11)
    sparsify(model, density={"0.weight": 0.5, "4.weight": 0.2}, sparse=sparse)
    ticket = Ticket.from_model(model, inits=inits)
    assert not ticket.values
    loaded = Ticket.load(ticket.save(tmp_path / "ticket.safetensors"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    loaded.apply(model)
    for name, weight in loaded.weights().items():
        layer = model.get_submodule(name.rpartition(".")[0])
        own = layer.to_dense().weight if sparse and name in loaded.masks else model.get_parameter(name)
        assert_same_bits(own, weight)
    loaded.export(tmp_path / "dense.safetensors", model)
    assert Ticket.from_model(model, inits=inits).sha256 == ticket.sha256
    stored = Ticket.from_model(model)  # without inits: survivors' values
    assert stored.values
    stored.apply(model)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_ticket_search_runs_here(sparse, tmp_path):
    x, y = X.to(DEVICE), (X[:, 0] > 0).long().to(DEVICE)
    search = TicketSearch(
        lambda: mlp().to(DEVICE),
        out=tmp_path,
        rounds=1,
        fractions=0.5,
        trials=1,
        seed=0,
        init="kaiming_normal",
        controls=("reinit", "shuffle", "random"),
        sparse=1.0 if sparse else 0.0,
    )
    runs = 0
    for run in search:
        optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-2)
        for iteration in range(run.restore(optimizer=optimizer) + 1, 5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(run.model(x), y)
            loss.backward()
            optimizer.step()
            run.step(iteration)
            if iteration % 2 == 0:
                run.log(iteration, val_loss=loss.detach(), test_accuracy=0.5)
        runs += 1
    assert runs == 5
    ticket = Ticket.load(tmp_path / "tickets" / "trial0-level1.safetensors")
    assert ticket.density == pytest.approx(0.5)


def test_a_default_device_does_not_move_what_is_made_by_the_way(tmp_path):
    model = mlp().to(DEVICE)
    inits = initperf.initialize(model, "kaiming_normal", seed=11)
    expected = Ticket.from_model(model, inits=inits).sha256
    torch.set_default_device(DEVICE)
    try:
        assert widest(NAME) is torch.float32
        made = mlp()
        initperf.initialize(made, "kaiming_normal", seed=11)
        ticket = Ticket.from_model(made, inits=inits)
        assert ticket.sha256 == expected
        Ticket.load(ticket.save(tmp_path / "ticket.safetensors")).apply(made)
        moments(made[0].weight)
        describe(made)
        prune.magnitude({n: p.detach() for n, p in made.named_parameters()}, 0.5)
        sparsify(made, {"0.weight": MASK.to(DEVICE)})
        made(X.to(DEVICE)).sum().backward()
    finally:
        torch.set_default_device(None)


def test_no_kernel_was_chosen_for_the_device():
    """Sampling and selection are the CPU's, all products the reference's."""
    backends = {name: {b for n, b in ops.CALLS if n == name} for name, _ in ops.CALLS}
    products = {
        name: found for name, found in backends.items() if "linear" in name or "conv2d" in name or "grad" in name
    }
    assert {"masked_linear", "sparse_linear", "masked_conv2d", "masked_grad_weight"} <= products.keys()
    assert all(found == {"reference"} for found in products.values()), products
    assert backends["kth_smallest"] == {"numba"}


def test_one_warning_names_the_device_and_a_remedy(told):
    (record,) = [r for r in told if NAME in r.getMessage()]
    assert record.levelno == logging.WARNING
    assert "Remedy" in record.getMessage()


def test_all_that_ran_here_exists_on_mps():
    """By torch's own table of what its MPS backend implements."""
    from importlib.resources import files

    table = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    entries = {entry.split("(", 1)[0]: entry for entry in table.split("\n- func: ")[1:]}

    def on_mps(name: str) -> bool:
        entry = entries.get(name) or next(
            e for e in entries.values() if name in e.partition("autogen:")[2].split("\n")[0]
        )
        _, delegates, other = entry.partition("structured_delegate: ")
        if delegates:
            return on_mps(other.split()[0])
        keys = [
            line.partition(":")[0]
            for line in entry.partition("  dispatch:\n")[2].split("\n")
            if line.startswith("    ")
        ]
        return not keys or any("MPS" in key or "Composite" in key for key in keys)

    # out= stands for the plain op where a CPU kernel of torch's calls it
    missing = sorted(name for name in fake_device.OPS if not on_mps(name.removeprefix("aten::")))
    assert not missing
