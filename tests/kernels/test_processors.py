"""What kernels are compiled for: any x86 processor from AVX2 on; those before run plain torch; no home mixes them up."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from initperf import init

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")

HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}  # AVX2, FMA, F16C
IVY_BRIDGE = {"NUMBA_CPU_NAME": "ivybridge", "NUMBA_CPU_FEATURES": ""}  # no FMA
INSTRUCTIONS = "from initperf.kernels.cpu.core.target import has_avx512, lacks; print(has_avx512(), lacks())"


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)  # with others beside it
    assert process.returncode == 0, err
    return out.strip(), err


def run(code: str, **environment: str) -> str:
    return finish(start(code, **environment))[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NUMBA_CPU_NAME": "skylake-avx512", "NUMBA_CPU_FEATURES": ""}, "True"),
        ({"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": ""}, "True"),
        ({"NUMBA_CPU_NAME": "knl", "NUMBA_CPU_FEATURES": ""}, "False"),  # 512 bits, but no masks of bytes
        (HASWELL, "False"),
        ({"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}, "False"),
        ({"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+avx2,+fma"}, "False F16C"),
        (IVY_BRIDGE, "False FMA"),
        ({"NUMBA_CPU_NAME": "sandybridge", "NUMBA_CPU_FEATURES": ""}, "False FMA and F16C"),
        ({"NUMBA_CPU_NAME": "generic"}, "False FMA and F16C"),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else value,
)
def test_instructions_are_those_of_the_processor_that_is_compiled_for(environment, expected):
    assert run(INSTRUCTIONS, **environment) == expected


def test_without_avx_there_is_no_avx512_either():
    assert run(INSTRUCTIONS, NUMBA_ENABLE_AVX="0").startswith("False")


USED = """
import torch
from initperf import MaskedLinear, SparseConv2d, SparseLinear, init, moments, ops; from initperf.cli import doctor
torch.manual_seed(3)
for fill in (init.normal_, init.trunc_normal_):
    print(fill(torch.empty(3000)).view(torch.int32).sum().item())
mask = torch.arange(12 * 20).view(12, 20) % 3 == 0
for kind in (MaskedLinear, SparseLinear):
    layer = kind(20, 12, mask=mask)
    layer(torch.ones(5, 20)).sum().backward()
    layer.eval()(torch.ones(1, 20))
image = SparseConv2d(2, 3, 3, mask=torch.arange(54).view(3, 2, 3, 3) % 2 == 0)
image(torch.ones(2, 2, 6, 6)).sum().backward()
print(moments([torch.ones(9)]).mean.item(), {backend for _, backend in ops.CALLS} & {"numba", "reference"})
print(*doctor._advice(doctor.examine(check=False)))
"""


def test_a_processor_without_fma_runs_plain_torch_to_the_same_bits_and_is_told_so_once():
    """A call of fmaf for every survivor would take longer than torch's dense product, and float16 would crash without F16C."""
    out, said = finish(start(USED, **IVY_BRIDGE))
    *values, used, advice = out.splitlines()
    torch.manual_seed(3)
    fills = (init.normal_, init.trunc_normal_)
    assert values == [str(fill(torch.empty(3000)).view(torch.int32).sum().item()) for fill in fills]
    assert used == "1.0 {'reference'}"
    for message in (advice, said):
        assert message.count("numba compiles for a processor without FMA: on the CPU every op runs in plain torch") == 1


COMPILED = """
import torch
from initperf.kernels.cpu.masks import zero_pruned as masking
t, mask = torch.arange(1., 41.), torch.arange(40) % 3 == 0
assert torch.equal(masking.zero_pruned(t.clone(), mask), torch.where(mask, t, 0))
stats = masking._zero_pruned.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_processors_that_share_a_home_load_no_code_of_each_other(tmp_path):
    home = {"INITPERF_CACHE_DIR": str(tmp_path)}
    assert run(COMPILED, **home) == "0 1"
    assert run(COMPILED, **home, **HASWELL) == "0 1"
    assert run(COMPILED, **home) == "1 0"
    assert run(COMPILED, **home, **HASWELL) == "1 0"


def test_of_processes_that_start_together_one_compiles_and_the_others_load(tmp_path):
    together = [start(COMPILED, INITPERF_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    assert sorted(finish(process)[0] for process in together) == ["0 1", "1 0", "1 0"]
