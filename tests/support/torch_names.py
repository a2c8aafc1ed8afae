"""Finds private names of torch in a source file, for tests/project/test_torch_private.py."""

import ast
from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

GETATTR = {"getattr", "setattr", "hasattr", "delattr"}
Found = tuple[int, str]  # line, name


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def torchs_own() -> frozenset[str]:
    """Private names in torch's modules and objects."""
    x = torch.ones(2, 2, requires_grad=True) * 2
    things = (
        *(torch, torch._C, torch._C._functorch, torch.overrides, torch.compiler, torch.library),
        *(torch.autograd, torch.autograd.forward_ad, torch.autograd.graph, torch.autograd.Function),
        *(nn.init, nn.modules.module, nn.modules.conv, nn.modules.batchnorm, nn.utils.parametrizations),
        *(nn.Conv2d(1, 1, 1), nn.LSTM(1, 1), nn.MultiheadAttention(2, 1), nn.BatchNorm1d(1), nn.Sequential()),
        *(x, x.grad_fn, nn.Parameter(torch.ones(1)), torch.amp.GradScaler("cpu"), torch.ops.aten.mm.default),
        torch.library.Library("initperf_names", "DEF"),
    )
    return frozenset(name for thing in things for name in dir(thing) if private(name))


def defined(tree: ast.Module) -> set[str]:
    """Names that a file gives to functions, classes, variables and attributes of self."""
    nodes = list(ast.walk(tree))
    found = {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    found |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    of_self = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return found | {n.attr for n in of_self if isinstance(n.value, ast.Name) and n.value.id == "self"}


def uses(tree: ast.Module, own: set[str], allowed: set[str]) -> list[Found]:
    """Where a file uses what is private to torch. own: names of the package; allowed: those that every file may use."""
    nodes = [
        n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom, ast.Attribute, ast.Call, ast.Subscript))
    ]
    imports = [found for node in nodes for found in _imports(node)]
    imported = {"torch"}.union(*(names for names, _, _ in imports))
    found = [(line, name) for _, path, line in imports for name in path if private(name)]
    for node in nodes:
        found += _members(node, imported, own, allowed)
        found += _strings(node, own | allowed)
        if _called(node) == "super" and node.args:
            base = ast.unparse(node.args[0])
            found += [(node.lineno, f"super({base}, ...)")] * (base.split(".")[0] in imported)
    return sorted(set(found))


def _called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _imports(node: ast.AST) -> Iterator[tuple[set[str], list[str], int]]:
    """Of what a statement imports from torch: the names it binds, the parts of its path, its line."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
        path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield {alias.asname or alias.name for alias in node.names}, path, node.lineno
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == "torch":
                yield {alias.asname or "torch"}, alias.name.split("."), node.lineno


def _members(node: ast.AST, imported: set[str], own: set[str], allowed: set[str]) -> Iterator[Found]:
    """Below a name imported from torch, any private one; below others, those that torch's objects have."""
    if not isinstance(node, ast.Attribute) or not private(node.attr):
        return
    root: ast.expr = node
    while isinstance(root, ast.Attribute):
        root = root.value
    torchs = isinstance(root, ast.Name) and root.id in imported or node.attr in torchs_own() and node.attr not in own
    hooks_of_a_tensor = node.attr == "_backward_hooks" and isinstance(node.ctx, ast.Store)  # modules have some, too
    if torchs and node.attr not in allowed or hooks_of_a_tensor:
        yield node.lineno, node.attr


def _strings(node: ast.AST, known: set[str]) -> Iterator[Found]:
    """In a call of getattr and its kin, or an index; of an f-string its beginning."""
    if _called(node) in GETATTR:
        strings = node.args[1:2]
    else:
        strings = [node.slice] if isinstance(node, ast.Subscript) else []
    for string in strings:
        first = string.values[0] if isinstance(string, ast.JoinedStr) else string
        text = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
        names = {n for n in torchs_own() if n.startswith(text)} if first is not string else torchs_own() & {text}
        if private(text) and names - known:
            yield string.lineno, text
