"""fast_init: inside the block and in its thread constructors sample by the contract; nothing leaks out; what we cannot do is torch's."""

import threading
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn
from torch.nn import init as torch_init

from initperf import init
from initperf.init import fast_init
from tolerance import bits

NAMES = [*torch_init.__all__, "_no_grad_uniform_", "_no_grad_normal_", "_no_grad_trunc_normal_"]


def now():
    """Everything that fast_init replaces, as it is at this moment."""
    names = {name: getattr(torch_init, name) for name in NAMES}
    return names | {f"Tensor.{name}": Tensor.__dict__.get(name) for name in ("normal_", "uniform_")}


OUTSIDE = now()


@pytest.fixture(autouse=True)
def _nothing_leaks():
    assert now() == OUTSIDE
    yield
    assert now() == OUTSIDE


def state(model):
    return [bits(v) for v in model.state_dict().values() if v.is_floating_point()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(state(a), state(b), strict=True))


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Embedding(20, 8), nn.LSTM(4, 4), nn.Transformer(8, 2)
    )


def test_a_constructor_gives_the_values_of_the_functional_api():
    torch.manual_seed(1)
    with fast_init():
        layer = nn.Linear(30, 20)
    torch.manual_seed(1)
    weight = init.kaiming_uniform_(torch.empty(20, 30), a=5**0.5)
    bias = init.uniform_(torch.empty(20), -(30**-0.5), 30**-0.5)
    assert torch.equal(bits(layer.weight.detach()), bits(weight))
    assert torch.equal(bits(layer.bias.detach()), bits(bias))


def test_manual_seed_or_the_blocks_own_seed_makes_it_reproducible():
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        with fast_init():
            models.append(net())
    assert same(*models)
    seeded = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        with fast_init(seed=7):
            seeded.append(net())
        rest = torch.rand(1)
        torch.manual_seed(torch_seed)
        assert torch.equal(rest, torch.rand(1))  # torch's generator was not used
    assert same(*seeded)
    with fast_init(seed=8):
        assert not same(net(), seeded[0])


def test_layers_of_one_block_differ():
    with fast_init(seed=7):
        a, b = nn.Linear(9, 9), nn.Linear(9, 9)
    assert not torch.equal(a.weight, b.weight)


@pytest.mark.parametrize("name", ["normal_", "uniform_"])
def test_tensor_methods_are_redirected_with_every_way_to_call_them(name):
    low, high = {"normal_": ("mean", "std"), "uniform_": ("from", "to")}[name]
    ours = getattr(init, name)
    results = []
    with fast_init():
        for args, kwargs in (((), {}), ((0.5, 2.0), {}), ((0.5,), {high: 2.0}), ((), {low: 0.5, high: 2.0})):
            torch.manual_seed(3)
            tensor = torch.empty(50)
            assert getattr(tensor, name)(*args, **kwargs) is tensor
            results.append(tensor)
        generator = torch.Generator().manual_seed(3)
        drawn = getattr(torch.empty(50), name)(generator=generator)
    torch.manual_seed(3)
    expected = ours(torch.empty(50))
    torch.manual_seed(3)
    moved = ours(torch.empty(50), 0.5, 2.0)
    assert torch.equal(results[0], expected)
    assert torch.equal(drawn, expected)
    assert all(torch.equal(r, moved) for r in results[1:])


def test_functions_that_were_imported_before_the_block_are_redirected_too():
    kept = OUTSIDE["trunc_normal_"], OUTSIDE["xavier_uniform_"], OUTSIDE["normal_"]
    for function, ours in zip(kept, (init.trunc_normal_, init.xavier_uniform_, init.normal_), strict=True):
        torch.manual_seed(3)
        with fast_init():
            got = function(torch.empty(20, 30))
        torch.manual_seed(3)
        assert torch.equal(bits(got), bits(ours(torch.empty(20, 30))))


def test_a_function_that_was_imported_inside_the_block_is_torchs_after_it():
    with fast_init():
        from torch.nn.init import normal_ as kept

        method = Tensor.uniform_
    torch.manual_seed(3)
    a, b = kept(torch.empty(30)), method(torch.empty(30))
    torch.manual_seed(3)
    assert torch.equal(a, torch.empty(30).normal_())
    assert torch.equal(b, torch.empty(30).uniform_())


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), fast_init(seed=1):
        raise KeyError
    torch.manual_seed(3)
    a = torch_init.normal_(torch.empty(30))
    torch.manual_seed(3)
    assert torch.equal(a, torch.empty(30).normal_())


def test_blocks_nest_and_each_has_its_own_seed():
    with fast_init(seed=1):
        a = nn.Linear(4, 4)
        b = nn.Linear(4, 4)
    with fast_init(seed=1):
        c = nn.Linear(4, 4)
        with fast_init(seed=1):
            inner = nn.Linear(4, 4)
        d = nn.Linear(4, 4)
    assert same(a, c)
    assert same(a, inner)
    assert same(b, d)


def test_other_threads_get_torchs_own_while_the_block_is_open():
    inside, done = threading.Event(), threading.Event()
    got = {}

    def other():
        inside.wait(10)
        generator = torch.Generator().manual_seed(3)
        got["other"] = torch_init.normal_(torch.empty(30), generator=generator)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fast_init():
        inside.set()
        assert done.wait(10)
        generator = torch.Generator().manual_seed(3)
        got["here"] = torch_init.normal_(torch.empty(30), generator=generator)
    thread.join()
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(got["other"], torch.empty(30).normal_(generator=generator))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(got["here"], init.normal_(torch.empty(30), generator=generator))


def test_blocks_of_many_threads_overlap_in_any_order():
    expected = []
    for seed in range(6):
        with fast_init(seed=seed):
            expected.append(nn.Linear(50, 50))
    got = [None] * 6
    barrier = threading.Barrier(6)

    def work(seed):
        barrier.wait(10)
        for _ in range(20):
            with fast_init(seed=seed):
                got[seed] = nn.Linear(50, 50)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))


def test_a_default_device_does_not_switch_it_off():
    with fast_init(seed=1):
        a = net()
    with fast_init(seed=1), torch.device("cpu"):
        b = net()
    assert same(a, b)
    with fast_init(seed=1), torch.device("meta"):
        assert all(p.is_meta for p in net().parameters())


def test_what_we_cannot_do_is_torchs_own():
    def results():
        torch.manual_seed(3)
        yield torch.empty(5, dtype=torch.complex64).normal_()
        yield torch.empty(5).normal_(0, float("inf")).isinf()
        yield torch.nn.init.normal_(torch.empty(4, dtype=torch.complex128), 0, 2)
        leaf = torch.zeros(4, requires_grad=True)
        for call in (
            lambda: leaf.normal_(),
            lambda: torch.empty(4, dtype=torch.int64).normal_(),
            lambda: torch.empty(3).uniform_(1, 0),
            lambda: torch.empty(3).uniform_("a"),
            lambda: torch.empty(3).normal_(0, 1, 2),
            lambda: torch.empty(3).normal_(sigma=2),
            lambda: torch.nn.init.kaiming_uniform_(torch.empty(3)),
            lambda: torch.nn.init.uniform_(),
        ):
            with pytest.raises((RuntimeError, TypeError, ValueError)) as error:
                call()
            yield type(error.value), str(error.value)

    outside = list(results())
    with fast_init(seed=1):
        inside = list(results())
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_recorded_sampling_keeps_its_gradient_rules():
    x = torch.ones(4, requires_grad=True) * 2
    with fast_init(seed=1):
        x.normal_()
    assert x.grad_fn.name().startswith("Normal")


def test_what_someone_else_replaced_inside_the_block_stays_replaced(monkeypatch):
    def mine(tensor):
        return tensor

    with fast_init():
        monkeypatch.setattr(torch_init, "ones_", mine)
        torch_init.normal_ = mine
    assert torch_init.normal_ is mine
    monkeypatch.undo()
    torch_init.normal_ = OUTSIDE["normal_"]


def test_a_bad_seed_is_refused_before_the_block():
    with pytest.raises(ValueError, match="seed"), fast_init(seed=-1):
        pass


def test_a_compiled_function_samples_as_torch_does_and_leaves_the_block_working():
    @torch.compile(backend="eager")
    def scaled(x):
        return nn.functional.relu(x) * 2

    with fast_init(seed=1):
        model = torch.compile(nn.Linear(30, 20), backend="eager")
        got = model(torch.ones(2, 30))
        scaled(torch.ones(3))
        again = nn.Linear(30, 20)
    with fast_init(seed=1):
        first, second = nn.Linear(30, 20), nn.Linear(30, 20)
    assert same(model._orig_mod, first)
    assert same(again, second)
    assert torch.equal(got, first(torch.ones(2, 30)))

    @torch.compile(backend="eager")
    def filled(x):
        return nn.init.normal_(x.clone(), 1.0, 2.0)

    with fast_init(seed=1):
        x = filled(torch.zeros(4000))
    assert abs(x.mean() - 1) < 0.2
    assert abs(x.std() - 2) < 0.2
    assert abs(filled(torch.zeros(4000)).std() - 2) < 0.2  # outside: what was compiled inside must not stay ours


def test_a_model_made_on_meta_in_the_block_is_initialized_by_its_reset_outside_any():
    with fast_init(seed=1), torch.device("meta"):
        model = net()
    empty = model.to_empty(device="cpu")
    with fast_init(seed=2):
        for module in empty.modules():
            getattr(module, "reset_parameters", getattr(module, "_reset_parameters", lambda: None))()
    assert all(p.isfinite().all() for p in empty.parameters())


def test_exceptions_in_nested_blocks_and_generators_left_open_restore_everything():
    with pytest.raises(ZeroDivisionError), fast_init(seed=1), fast_init(seed=2):
        _ = 1 / 0
    assert now() == OUTSIDE

    def making():
        with fast_init(seed=1):
            yield nn.Linear(3, 3)

    open_generator = making()
    next(open_generator)
    assert now() != OUTSIDE
    open_generator.close()
    assert now() == OUTSIDE

    @fast_init(seed=5)
    def decorated():
        return nn.Linear(3, 3)

    assert same(decorated(), decorated())


def test_every_name_in_torch_is_what_it_was_after_transformers_was_used_inside_the_block():
    pytest.importorskip("transformers", reason="transformers is not installed")
    from families import build

    parts = ["init", "modules.activation", "modules.transformer", "modules.linear", "modules.conv", "modules.rnn"]

    def everything():
        return {(part, key): value for part in parts for key, value in vars(import_module(f"torch.nn.{part}")).items()}

    build("Bert")
    outside = everything()
    for seed in (1, 2):
        with fast_init(seed=seed):
            build("Bert")
    assert everything() == outside
    assert import_module("transformers.initialization").TORCH_INIT_FUNCTIONS["normal_"] is OUTSIDE["normal_"]


@pytest.mark.parametrize("family", ["Bert", "GPT2", "ViT", "ResNet"])
def test_transformers_models_start_reproducibly_and_distributed_as_before(family):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{family}Config")(
        **{
            "Bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
            "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 500},
            "ViT": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32},
            "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        }[family]
    )
    make = getattr(import_module("transformers"), f"{family}Model")
    torch.manual_seed(0)
    plain = make(config)
    with fast_init(seed=1):
        a = make(config)
    with fast_init(seed=1):
        b = make(config)
    assert same(a, b)
    for (name, p), q in zip(plain.named_parameters(), a.parameters(), strict=True):
        if p.numel() >= 1000 and p.std() > 0:
            assert not torch.equal(p, q), name
            assert abs(q.std() / p.std() - 1) < 0.2, name
