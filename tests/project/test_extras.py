"""A light installation: what is required is enough for every day, what is optional says how to get it, what is missing is made up for."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from initperf.core.extras import EXTRAS, installation, need, needed

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "support"  # the cases that its processes run
REQUIRED = ("torch", "torchgen", "functorch", "numpy", "numba", "llvmlite", "safetensors")
OF_TORCH = (
    "filelock",
    "fsspec",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "sympy",
    "typing_extensions",
    "setuptools",
)
CLI = f"Expected rich and typer to be installed: {installation('cli')}. Got an installation without."
REPORT = f"Expected matplotlib to be installed: {installation('report')}. Got an installation without."


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, cwd=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@cache
def everyday(*arguments):
    """What tests/support/everyday.py tells."""
    return json.loads(run("everyday.py", *arguments).splitlines()[-1])


def test_what_is_required_is_enough_for_every_day():
    found = everyday("--only", *REQUIRED, *OF_TORCH)
    assert found["problems"] == {"report": REPORT, "figure": REPORT, "table": CLI}
    assert found["command"] == [1, f"initperf: {CLI}\n"]
    assert found["loaded"] == []
    assert found["warnings"] == []
    assert "numba" in found["backends"]


def test_optional_packages_are_loaded_by_what_needs_them_only():
    found = everyday()
    assert set(found["loaded"]) <= {"rich", "scipy"}  # str() of verdicts; numba looks for SciPy
    assert found["problems"] == {}
    assert found["command"] == [0, ""]
    assert found["sha256"] == everyday("--only", *REQUIRED, *OF_TORCH)["sha256"]


def test_without_numba_everything_works_by_the_reference_with_the_same_bits_and_one_warning():
    found = everyday("--without", "numba", "llvmlite")
    assert found["sha256"] == everyday()["sha256"]
    (warning,) = found["warnings"]
    assert warning.startswith("numba is not installed")
    assert "pip install" in warning
    assert "numba" not in found["backends"]
    assert "reference" in found["backends"]


SEARCHES = """
import logging, sys
import {first}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{compiler}":
            raise ImportError("Numba needs NumPy 2.3 or less. Got NumPy 9.9.")
        return None
sys.meta_path.insert(0, Finder())
"""


def test_a_numba_that_cannot_be_imported_is_made_up_for_and_named():
    code = SEARCHES.format(first="numpy", compiler="numba") + (
        "import torch\nfrom initperf import init\n"
        "init.normal_(torch.empty(5), seed=1); init.uniform_(torch.empty(5), seed=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Numba needs NumPy") == 1
    assert "pip install --upgrade numba" in done.stderr


def test_without_triton_the_gpus_ops_are_the_references_with_one_warning():
    code = """
import everyday, logging
everyday.hide("--without", ["triton"])
import torch
from initperf import ops, rng, init, choice
from initperf.layers.ops.masked_linear import masked_linear
assert {ops.backend_of(name, "cuda") for name in ops.MODULES} == {"reference"}
for _ in range(2):
    for name in ("sample_", "masked_linear"):
        assert ops.implementation(name, "cuda").__name__ == "counted"
x = ops.implementation("sample_", "cuda")(torch.empty(5), *rng.normal(0, 1), 3, 0)
assert torch.equal(x, init.normal_(torch.empty(5), seed=3))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("triton is not installed") == 1
    assert installation("gpu") in done.stderr


def test_no_extra_is_named_that_does_not_exist():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = [line.split(">=")[0] for line in extras[extra]]
        assert sorted(listed) == sorted(packages)
    for extra in EXTRAS:
        need(extra)  # the development environment has all of them


def test_an_error_inside_the_package_is_not_taken_for_a_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="initperf_has_no_such_module"), needed("cli"):
        import initperf_has_no_such_module  # noqa: F401
