"""`import initperf` is quick, loads no compiler and compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from initperf import kernels

LIMIT = 0.2  # of what `import torch` takes
EVERY_EXPORT = "[getattr(initperf, name) for name in getattr(initperf, '__all__', ())]"
TIMED = f"""
import time
times = [time.process_time()]  # of this process alone, whatever else the machine does
import torch
times.append(time.process_time())
import initperf
{EVERY_EXPORT}
times.append(time.process_time())
print((times[2] - times[1]) / (times[1] - times[0]))
"""
LOADED = f"""
import sys, torch
before = set(sys.modules)
import initperf
{EVERY_EXPORT}
print(*{{name.split(".")[0] for name in set(sys.modules) - before}})
"""
COMPILED = """
import importlib, pkgutil, initperf.kernels.cpu as cpu
from numba.core.dispatcher import Dispatcher
found = []
for about in pkgutil.walk_packages(cpu.__path__, cpu.__name__ + "."):
    module = importlib.import_module(about.name)
    kernels = [v for v in vars(module).values() if isinstance(v, Dispatcher)]
    found += [f"{about.name}.{k.__name__}" for k in kernels if k.signatures]
    print(len(kernels))
print("compiled:", *found)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_initperf_and_all_it_exports_adds_at_most_a_fifth_to_torch():
    shares = [float(run(TIMED)) for _ in range(3)]
    assert min(shares) <= LIMIT, shares


def test_importing_initperf_loads_no_compiler_and_no_plotting():
    loaded = set(run(LOADED).split())
    assert "initperf" in loaded
    assert not loaded & {"numba", "llvmlite", "triton", "matplotlib", "rich", "typer"}


def test_importing_initperf_compiles_nothing(tmp_path):
    run(TIMED, INITPERF_CACHE_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_importing_the_cpu_kernels_compiles_none_that_numba_compiles_on_demand(tmp_path):
    *counts, last = run(COMPILED, INITPERF_CACHE_DIR=str(tmp_path)).splitlines()
    assert sum(map(int, counts)) > 0
    assert last.split() == ["compiled:"]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["ticket", "--help"], ["doctor", "--help"]])
def test_help_and_version_import_neither_torch_nor_numpy(arguments):
    code = f"""
import sys
from initperf.cli.main import main
assert main({arguments!r}) == 0
assert not {{"torch", "numpy", "matplotlib", "numba"}} & set(sys.modules)
"""
    assert run(code)


def test_kernels_leave_torchs_number_of_threads_alone():
    """Numba's OpenMP layer sets the process's number when it starts, which torch's convolutions go by."""
    pytest.importorskip("numba")
    code = (
        "import torch; torch.set_num_threads(1); from initperf import SparseConv2d, choice\n"
        "with choice.prefer('sparse'):\n"
        "    layer = SparseConv2d(3, 8, 3, mask=torch.rand(8, 3, 3, 3) < 0.3)\n"
        "    layer(torch.randn(16, 3, 8, 8)).sum().backward()\n"
        "print(torch.get_num_threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1"]


def test_the_cache_of_compiled_kernels_is_keyed_by_every_file_they_are_made_of():
    """In folders of any depth: a file that is left out gives stale kernels."""
    pytest.importorskip("numba")
    from initperf.kernels.cpu.core import jit

    root = Path(kernels.__path__[0])
    files = {root / "contract.py", *(root / "cpu").rglob("*.py")}
    assert len(files) > 40
    assert files <= set(jit._FILES)
