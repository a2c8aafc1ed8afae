"""Machine code of both moment kernels, compiled ahead of time for every main target: no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}  # threads of a warp
COMPILE = """
import json, sys, torch
from benchmarks.aot import capture
from initperf.kernels.gpu import moments
n, found = 4096, []
x = {t: torch.empty(n, n, device="meta", dtype=getattr(torch, t)) for t in ("float32", "bfloat16", "float64")}
flat = (1, 1, n * n, n * n, n * n)
for target in sys.argv[1:]:
    for name, order, tensors, shapes in (
        ("a list", 2, [*x.values()] * 50, [flat] * 150), ("columns", 4, [x["float32"]], [(n, n, 1, n, 1)]),
    ):
        with capture(target) as launches:
            moments.moments(tensors, shapes, order, 0.0)
        for launch in launches:
            code = launch.code
            found.append({
                "target": target, "what": name, "kernel": launch.kernel, "programs": launch.programs,
                "wide": launch.arguments.get("WIDE"), "spills": code.spills, "stack": code.stack,
                "loads": code.widths("load"), "stores": code.widths("store"),
            })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def launches():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COMPILE, *TARGETS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_no_register_spills_and_no_stack_is_used(launches):
    assert {x["target"] for x in launches} == set(TARGETS)
    assert {x["kernel"] for x in launches} == {"_read", "combine"}
    assert not [x for x in launches if x["spills"] or x["stack"]]


def test_a_list_of_150_tensors_takes_one_launch_a_class_and_one_that_combines(launches):
    for target in TARGETS:
        kernels = [x["kernel"] for x in launches if x["target"] == target and x["what"] == "a list"]
        assert kernels == ["_read", "_read", "combine"]  # 32 bits and less, float64
        assert [x["kernel"] for x in launches if x["target"] == target and x["what"] == "columns"] == [
            "_read",
            "combine",
        ]


def test_aligned_values_come_in_128_bit_loads_and_every_value_is_loaded_once(launches):
    from initperf.kernels.gpu.moments import TILES

    for x in launches:
        if x["kernel"] != "_read":
            continue
        tile = TILES[x["wide"] + 2 * (x["what"] == "columns")]
        values = tile["rows"] * tile["columns"] // (tile["warps"] * TARGETS[x["target"]])  # of a thread
        loads = {int(bits): count for bits, count in x["loads"].items()}
        if x["wide"]:
            # Two paths, aligned and not, of which one is taken. What is left of 64 bits is the plan of the tensor.
            assert loads[128] == values // 2, x
        else:
            assert loads[128] >= values // 4, x
            assert loads[128] <= values // 4 + 2 * (values // 8), x  # float32; bfloat16 and float16
            assert loads[32] == values, x
            assert loads[16] <= 4 * values, x  # both of 16 bits; in columns aligned too
