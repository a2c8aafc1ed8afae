"""The rooms of docs/design.md are those of the code: who may import whom, no circles, one list of public names, every op complete."""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import initperf

ROOT = Path(__file__).resolve().parents[2]
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
FACADES = {"initperf", "initperf.init"}  # their re-exports, imported when first asked for, are no arrows
UNUSED = "kernels/gpu/candidates"  # kernels that no layer runs yet
TYPE_CHECKING = re.compile(r"\bTYPE_CHECKING\b")


def table(heading):
    """The rows of the table below a heading of docs/design.md, without backquotes."""
    text = DESIGN.split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line.strip().strip("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.replace("`", "").strip() for cell in line.split("|")] for line in lines[2:]]


def modules():
    """Module name -> its file, of initperf and of kernels, which installs as initperf.kernels."""
    found = {}
    for top in ("initperf", "kernels"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] == ("initperf", "kernels"):
                continue  # the stand-in of the source tree
            parts = parts if top == "initperf" else ("initperf", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
ALIASES = {f"initperf.{row[0].removeprefix('initperf.')}": row[1] for row in table("Public names")}


def imports(name):
    """(imported module, name in it or None, typing only, line): whatever the depth, functions' own imports too."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]

    def visit(node, typing):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, None, typing, child.lineno
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                for alias in child.names:
                    full = f"{base}.{alias.name}"
                    found = (full, None) if full in MODULES else (base, alias.name)
                    yield *found, typing, child.lineno
            elif isinstance(child, ast.If) and TYPE_CHECKING.search(ast.dump(child.test)):
                yield from visit(child, True)
            else:
                yield from visit(child, typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def arrows(name):
    """Modules of ours that a module imports, but what a facade re-exports."""
    return {
        module
        for module, _, typing, _ in imports(name)
        if module in MODULES and module != name and not (typing and name in FACADES)
    }


def room_of(name):
    """The folder that a module lies in, as the table writes it; initperf/prune.py is a room of its own."""
    if name == "initperf.prune":
        return "prune"
    path = MODULES[name].relative_to(ROOT).parent.as_posix()
    return path.removeprefix("initperf/")


ROWS = table("Rooms and arrows")
MAY = {row[0]: [] if row[2] == "-" else row[2].split() for row in ROWS}


def row_of(room):
    """The row that speaks for a room: its own, or that of the folder around it (kernels/reference has one for all)."""
    while room not in MAY and "/" in room:
        room = room.rpartition("/")[0]
    return room


def allowed(room, target):
    for pattern in MAY[row_of(room)]:
        around = pattern.removesuffix("/*")
        if pattern == "*" or target == around or (around != pattern and target.startswith(f"{around}/")):
            return True
    return False


def circle(edges):
    """One circle of a graph, or None."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return None
        path.append(node)
        for other in sorted(edges.get(node, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return None

    sys.setrecursionlimit(max(10_000, sys.getrecursionlimit()))
    return next((found for node in sorted(edges) if (found := visit(node))), None)


def test_the_table_names_every_room_once():
    names = [row[0] for row in ROWS]
    assert len(set(names)) == len(names)
    rooms = {room_of(name) for name in MODULES if name not in ALIASES} - {"initperf"}
    assert {row_of(room) for room in rooms} == set(names)


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(ALIASES) - {"initperf"}))
def test_imports_point_only_where_the_table_allows(name):
    room = room_of(name)
    wrong = []
    for module in sorted(arrows(name)):
        target = room_of(module)
        if module == "initperf" or row_of(target) == row_of(room) or name == "initperf.__main__":
            continue
        if module in ALIASES:
            wrong.append(f"{module}, another name of {ALIASES[module]}")
        elif not allowed(room, target):
            wrong.append(f"{module} (of {target})")
    assert not wrong, f"{room} may import {', '.join(MAY[row_of(room)]) or 'nothing'}"


def test_nothing_of_the_package_imports_names_of_the_package_itself_but_its_version():
    allowed = {"__version__", "__all__", None}
    found = [
        f"{name}:{line} {what}"
        for name in MODULES
        for module, what, _, line in imports(name)
        if module == "initperf" and what not in allowed
    ]
    assert not found


def test_no_two_modules_import_each_other():
    edges = {name: arrows(name) - {"initperf"} for name in MODULES if name not in ALIASES and name != "initperf"}
    assert circle(edges) is None


def test_no_two_rooms_import_each_other():
    edges = {}
    for name in MODULES:
        if name not in ALIASES and name not in FACADES and name != "initperf.__main__":
            targets = {room_of(module) for module in arrows(name) - FACADES - set(ALIASES)}
            edges.setdefault(room_of(name), set()).update(targets - {room_of(name)})
    assert circle(edges) is None


def test_circles_and_wrong_arrows_would_be_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert not allowed("core", "layers")
    assert not allowed("kernels/cpu/core", "kernels/cpu/sparse")
    assert allowed("layers/ops", "layers/base")


def test_kernels_import_each_other_by_relative_names():
    """So that one sees that they import nothing of initperf."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("initperf"))
        or (isinstance(node, ast.Import) and any(a.name.startswith("initperf") for a in node.names))
    ]
    assert not found


# -- public names -------------------------------------------------------------------------------------------------------


def test_public_names_are_listed_once():
    names = initperf.__all__
    assert sorted(set(names)) == names
    modules = {"init", "prune"}
    assert set(initperf._HOMES) | modules == set(names)
    typed = {}
    for node in ast.walk(ast.parse((ROOT / "initperf/__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and TYPE_CHECKING.search(ast.dump(node.test)):
            for statement in node.body:
                for alias in statement.names:
                    assert alias.name not in typed
                    typed[alias.name] = statement.module
    assert typed == {n: f"initperf.{home}" for n, home in initperf._HOMES.items()} | dict.fromkeys(modules, "initperf")


@pytest.mark.parametrize("name", initperf.__all__)
def test_a_public_name_is_defined_where_the_list_says(name):
    value = getattr(initperf, name)
    if name in initperf._HOMES:
        assert value.__module__ == f"initperf.{initperf._HOMES[name]}"
        assert not hasattr(sys.modules.get(f"initperf.{name}"), "__path__"), "a package of this name would replace it"


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_another_name_of_a_module_is_the_module(alias):
    assert import_module(alias) is import_module(ALIASES[alias])


# -- ops ----------------------------------------------------------------------------------------------------------------


def ops_by_module():
    for name in initperf.__all__:
        getattr(initperf, name)
    from initperf.core import ops

    found = {}
    for op, module in ops.MODULES.items():
        found.setdefault(module, set()).add(op)
    return found


OPS = {row[0]: row[1:] for row in table("Ops")}


def test_the_table_of_ops_is_that_of_the_code():
    assert {module: set(row[0].split()) for module, row in OPS.items()} == ops_by_module()


def top_level(path):
    """Names that a file defines or imports."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name for a in node.names}
    return names


@pytest.mark.parametrize("module", OPS)
def test_an_op_has_its_reference_and_the_kernels_that_the_table_names(module):
    ops, _, *backends = OPS[module][:5]
    for folder, has in zip(("reference", "cpu", "gpu"), ["yes", *backends[:2]], strict=True):
        path = ROOT / "kernels" / folder / f"{module.replace('.', '/')}.py"
        assert path.exists() == (has == "yes"), path
        if path.exists():
            assert set(ops.split()) <= top_level(path), path


@pytest.mark.parametrize("module", OPS)
def test_an_op_has_a_public_name_that_runs_it_a_test_and_a_benchmark(module):
    ops, public, _, _, test, benchmark = OPS[module]
    assert public.split(".")[0] in initperf.__all__
    words = re.compile(rf"\b({'|'.join([*ops.split(), public.split('.')[-1]])})\b")
    for path in (ROOT / "tests" / test, ROOT / "benchmarks" / benchmark):
        assert words.search(path.read_text(encoding="utf-8")), f"{path} mentions neither {ops} nor {public}"


# -- every kernel is reached --------------------------------------------------------------------------------------------


class Module:
    """What a kernel file defines, what each definition names, and where imported names come from."""

    def __init__(self, name):
        self.uses, self.imported = {}, {}
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        for module, what, _, _ in imports(name):
            if what is None:
                self.imported[module.rpartition(".")[2]] = (module, None)
        package = name.split(".")[:-1]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                base = base if node.level else node.module
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    self.imported[alias.asname or alias.name] = (full, None) if full in MODULES else (base, alias.name)
        for node in tree.body:
            for bound in [*self.binds(node), *self.overloaded(node)]:
                self.uses.setdefault(bound, []).append(node)
        self.always = [n for n in tree.body if not self.binds(n) and not isinstance(n, (ast.Import, ast.ImportFrom))]

    @staticmethod
    def overloaded(node):
        """What a function is an implementation of: numba.extending.overload(x)."""
        calls = [d for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)]
        return [a.id for call in calls for a in call.args if isinstance(a, ast.Name)]

    @staticmethod
    def binds(node):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return [node.name]
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]

    def named_by(self, nodes, everything):
        """(module, name) of what these nodes name; of a module that is handed on as a value, all that it defines."""
        attributes = set()
        for node in (n for top in nodes for n in ast.walk(top)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, what = self.imported.get(node.value.id, (None, None))
                if module in MODULES and what is None:
                    attributes.add(id(node.value))
                    yield module, node.attr
            if isinstance(node, ast.Name) and id(node) not in attributes:
                module, what = self.imported.get(node.id, (None, None))
                if module in MODULES and what is not None:
                    yield module, what
                elif module in MODULES and everything:
                    yield module, None
                elif node.id in self.uses:
                    yield None, node.id


def reached():
    """(module, name) of the definitions in kernels that ops' launchers, and what else the package calls, come to."""
    known = {name: Module(name) for name in MODULES if name.startswith("initperf.kernels.")}
    from initperf.core import ops

    waiting = []
    for op, module in ops.MODULES.items():
        waiting += [(f"initperf.kernels.{backend}.{module}", op) for backend in ("cpu", "gpu", "reference")]
    for name in MODULES:
        if name not in known and name not in ALIASES:
            outside = Module(name)
            tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
            waiting += [found for found in outside.named_by([tree], everything=True) if found[0] in known]
    seen = set()
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or module not in known:
            continue
        seen.add((module, name))
        here = known[module]
        if name is None:
            waiting += [(module, each) for each in here.uses if not each.startswith("_")]
        nodes = [*here.uses.get(name, []), *here.always]
        waiting += [(m or module, n) for m, n in here.named_by(nodes, everything=False)]
        if name in here.imported:
            origin, what = here.imported[name]
            waiting.append((origin, what or name))
    return known, seen


def test_every_kernel_is_reached_by_a_layer_or_a_public_function():
    known, seen = reached()
    unreached = []
    for module, here in known.items():
        path = MODULES[module].relative_to(ROOT).as_posix()
        if path.startswith(("kernels/cpu", "kernels/gpu")) and not path.startswith(UNUSED):
            for name, nodes in here.uses.items():
                also = {other for n in nodes for other in here.overloaded(n)}  # found by Numba, under the other's name
                functions = any(isinstance(n, ast.FunctionDef) for n in nodes)
                if functions and not any((module, each) in seen for each in (name, *also)):
                    unreached.append(f"{path}: {name}")
    assert not unreached
    assert len(seen) > 300
