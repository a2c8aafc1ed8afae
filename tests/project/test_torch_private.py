"""Private names of torch: one file has them all, and this torch has each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils as fsdp
from torch.utils.flop_counter import FlopCounterMode

from initperf import rng
from initperf.core import torch_private
from torch_names import defined, uses

ROOT = Path(__file__).resolve().parents[2]
THE_FILE = ROOT / "initperf/core/torch_private.py"
FILES = sorted(p for name in ("initperf", "kernels") for p in (ROOT / name).rglob("*.py") if p != THE_FILE)
MEMBERS = {name for names in torch_private.MEMBERS.values() for name in names}
# torch documents _saved_<argument> of a node in its graph; the others are not torch's.
ALLOWED = MEMBERS | {"_saved_scale", "_fields", "_asdict", "_replace", "_exit", "_init_weights", "_launch_threads"}


def test_no_other_file_uses_a_private_name_of_torch():
    assert len(FILES) > 150
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    own = set().union(*map(defined, trees.values()))
    found = [f"{p.relative_to(ROOT)}:{line}: {n}" for p, tree in trees.items() for line, n in uses(tree, own, ALLOWED)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\nwith torch._C._AutoDispatchBelowAutograd(): pass",
        "import torch\ntorch._C.DisableTorchFunction()",
        "import torch\nisinstance(m, torch._dynamo.OptimizedModule)",
        "import torch\ntorch.overrides._get_current_function_mode_stack()",
        "import torch._dynamo",
        "import torch._inductor.config as config",
        "from torch._C._dynamo import eval_frame",
        "from torch import _C",
        "from torch.nn.modules.conv import _ConvNd",
        "from torch.utils._pytree import tree_map",
        "from torch import nn\nnn.modules.batchnorm._NormBase",
        "from torch.autograd import forward_ad as ad\nad._current_level < 0",
        "import torch\nclass F(torch.autograd.Function): pass\nsuper(torch.autograd.Function, F).apply",
        "view._backward_hooks = {0: print}",
        "view.grad_fn._register_hook_dict(view)",
        "tensor._base",
        "scaler._per_optimizer_states",
        "op._schema.name",
        "getattr(module, '_compiled_call_impl', None)",
        "module.__dict__['_is_full_backward_hook']",
        "import torch\ngetattr(torch.nn.init, f'_no_grad_{name}')",
        "def f():\n    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset",
    ],
)
def test_a_private_name_elsewhere_is_found(source):
    assert uses(ast.parse(source), set(), ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.empty(1)._version",
        "module._parameters['weight']",
        "module.__dict__['_forward_hooks']",
        "self._pattern",
        "import os\nos._exit(0)",
        "kind = '_grad'",
    ],
)
def test_members_that_are_listed_and_names_of_others_are_not(source):
    assert not uses(ast.parse(source), {"_pattern"}, ALLOWED)


@pytest.mark.parametrize("name", torch_private.__all__)
def test_this_torch_has(name):
    assert getattr(torch_private, name) is not None


def test_all_of_the_names_are_tested():
    """Whatever another file imports from there."""
    imported = {
        alias.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("core.torch_private")
        for alias in node.names
    }
    assert imported | {"MEMBERS"} == set(torch_private.__all__)


OBJECTS = {
    nn.Module: nn.Module,
    nn.Conv2d: lambda: nn.Conv2d(1, 1, 1),
    nn.RNNBase: lambda: nn.LSTM(1, 1),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(2, 1),
    nn.Transformer: lambda: nn.Transformer(2, 2, 1, 1, 2, batch_first=True),
    torch.Tensor: lambda: torch.ones(1),
}


@pytest.mark.parametrize("kind", torch_private.MEMBERS, ids=lambda kind: kind.__name__)
def test_objects_of_this_torch_have(kind):
    thing = OBJECTS[kind]()
    assert not [name for name in torch_private.MEMBERS[kind] if not hasattr(thing, name)]


def test_what_calls_are_asked_about_is_told():
    """Each answer both ways, since a name may stay and change its meaning."""
    p, x = torch_private, torch.ones(2)
    assert (p.dispatch_modes(), p.function_modes(), p.any_autocast(), p.transformed(), p.is_tracing()) == (
        0,
        0,
        *(False,) * 3,
    )
    assert p.function_transform() is None
    assert p.graph_task() == -1
    seen = []
    torch.func.vmap(lambda t: seen.append((p.transformed(), p.function_transform() is not None)) or t)(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append((p.transformed(), p.function_transform() is None))
    with torch.device("cpu"):
        seen.append((p.function_modes() == 1, isinstance(p.function_mode_stack()[0], p.DeviceContext)))
    with FlopCounterMode(display=False), torch.autocast("cpu"):
        seen.append((p.dispatch_modes() > 0, p.any_autocast()))
    torch.jit.trace(lambda t: seen.append((p.is_tracing(), True)) or t + 1, x, check_trace=False)
    y = x.clone().requires_grad_()
    y.register_hook(lambda _: seen.append((p.graph_task() >= 0, True)))
    (2 * y).sum().backward()
    assert seen == [(True, True)] * 6


def test_wrappers_put_these_names_in_paths():
    layer = nn.Linear(2, 2)
    wrapped = torch.compile(layer), nn.DataParallel(layer), checkpoint_wrapper.checkpoint_wrapper(layer)
    paths = [name for module in wrapped for name, p in nn.Module.named_parameters(module) if p is layer.weight]
    assert {path.removesuffix(".weight") for path in paths} | {fsdp.FSDP_WRAPPED_MODULE} == torch_private.WRAPPERS
    assert {rng.canonical_name(path) for path in paths} == {"weight"}


def test_a_scaler_tells_its_scale_and_what_it_divided():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert torch_private.scale_of(scaler) is None
    scaler.scale(weight.sum()).backward()
    assert torch_private.scale_of(scaler) == 8
    assert not torch_private.has_unscaled(scaler)
    scaler.unscale_(optimizer)
    assert torch_private.has_unscaled(scaler)
    scaler.step(optimizer)
    scaler.update()
    assert not torch_private.has_unscaled(scaler)


def test_a_compiled_model_is_told_and_asking_imports_no_compiler():
    code = """
import sys, torch
from initperf.core.torch_private import is_compiled
model = torch.nn.Linear(2, 2)
assert not is_compiled(model) and "torch._dynamo" not in sys.modules
assert is_compiled(torch.compile(model))
assert not is_compiled(model)
model.compile()
assert is_compiled(model)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
