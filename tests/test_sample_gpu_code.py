"""The sampling kernel's machine code, compiled ahead of time: IEEE operations as written, few instructions, wide stores, no spills.

Compiling needs Triton without its interpreter, so this file runs itself in a process of its own and reads its answers.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

UNIFORM, NORMAL, TRUNC_NORMAL, TRUNC_CENTER, TRUNC_TAIL, TRUNC_FAR, TRUNC_NARROW = range(1, 8)
PARAMS = {UNIFORM: 4, NORMAL: 4, TRUNC_NORMAL: 9, TRUNC_CENTER: 6, TRUNC_TAIL: 9, TRUNC_FAR: 14, TRUNC_NARROW: 12}
CASES = [
    (target, kind, "*fp32", False) for target in ("sm_80", "sm_90", "sm_100", "gfx942") for kind in (UNIFORM, NORMAL)
]
CASES += [("sm_90", kind, "*fp32", False) for kind in (TRUNC_NORMAL, TRUNC_CENTER, TRUNC_TAIL, TRUNC_FAR, TRUNC_NARROW)]
CASES += [("sm_90", kind, dtype, False) for kind in (UNIFORM, NORMAL) for dtype in ("*bf16", "*fp16")]
CASES += [("sm_90", NORMAL, "*fp64", False), ("gfx942", NORMAL, "*bf16", False), ("sm_90", NORMAL, "*fp32", True)]

# Operations as the formulas of initperf/rng.py write them, a word (of NORMAL: a pair of words): Horner's rule takes as
# many fmas as its degree; log: degree 7, and 3 more.
LOG = 10
FMAS = {
    UNIFORM: 1,
    NORMAL: LOG + 4 + 4 + 2,
    TRUNC_NORMAL: 2 + LOG + 8 + 8 + 1,
    TRUNC_CENTER: 2 + LOG + 6 + 1,
    TRUNC_TAIL: 2 + LOG + 8 + 8 + 1,
    TRUNC_FAR: 1 + LOG + 7 + 1,
    TRUNC_NARROW: 7 + 1,
}
SQUARE_ROOTS = {NORMAL: 1, TRUNC_NORMAL: 1, TRUNC_TAIL: 1}
WIDEST = {"sm_90": {UNIFORM: 24.0, NORMAL: 45.0}}  # machine instructions a value, at most


def facts(target, kind, dtype, masked):
    """Compile one specialization and count."""
    from gpu_code import compile_for
    from initperf.kernels.gpu.sample import TILES, _fill

    tiles, warps = TILES[{"*fp64": 8, "*fp32": 4}.get(dtype, 2)]
    warp = 64 if target == "gfx942" else 32
    signature = dict.fromkeys(("n", "k0", "k1", "s0", "s1", "shift", "groups", "run", "stride"), "i32")
    signature |= {"out_ptr": dtype, "first_tile": "i64", "p": ("fp32",) * PARAMS[kind]}
    code = compile_for(
        target,
        _fill,
        signature,
        {"KIND": kind, "TILES": tiles, "ONE_RUN": True, "MASKED": masked, "INTERPRETED": False},
        divisible_by_16=("out_ptr", "shift"),
        num_warps=warps * 32 // warp,
        enable_fp_fusion=False,
    )
    values = tiles * 1024 // (warps * 32)
    stores = Counter(name for name in code.instructions if re.match(r"STG|(global|buffer)_store", name))
    return {
        "values": values,
        "per_value": len(code.instructions) / values,
        "spills": code.spills,
        "registers": code.registers,
        "stores": stores,
        "ops": code.float_ops(),
        "inexact": re.findall(r"\S*(?:approx|\.ftz|div\.full|\bmad\.[\w.]*f\d)\S*", code.text)
        if target != "gfx942"
        else [],
    }


@pytest.fixture(scope="module")
def compiled():
    """Facts of all cases, from one process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {tuple(case): found for case, found in json.loads(done.stdout)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_no_value_is_spilled(compiled, case):
    assert compiled[case]["spills"] == 0


@pytest.mark.parametrize("case", [c for c in CASES if c[0] != "gfx942"], ids=lambda case: "-".join(map(str, case)))
def test_every_float_operation_is_one_rounded_ieee_operation(compiled, case):
    found = compiled[case]
    assert found["inexact"] == []
    assert all(".rn" in name for name in found["ops"]), found["ops"]
    formulas = found["values"] // (2 if case[1] == NORMAL else 1)
    assert found["ops"].get("fma.rn.f32", 0) == FMAS[case[1]] * formulas
    assert found["ops"].get("sqrt.rn.f32", 0) == SQUARE_ROOTS.get(case[1], 0) * formulas


@pytest.mark.parametrize("case", [c for c in CASES if not c[3]], ids=lambda case: "-".join(map(str, case)))
def test_stores_are_128_bits_wide(compiled, case):
    found = compiled[case]
    size = {"*fp64": 8, "*fp32": 4}.get(case[2], 2)
    assert all(re.search(r"\.128$|dwordx4$", name) for name in found["stores"]), found["stores"]
    if case[0] != "gfx942":  # its buffer and global forms are both emitted for one store
        assert sum(found["stores"].values()) * 16 == found["values"] * size


@pytest.mark.parametrize(
    "case", [c for c in CASES if c[1] in WIDEST.get(c[0], {}) and not c[3] and c[2] == "*fp32"], ids=str
)
def test_instructions_a_value_stay_within_the_target(compiled, case):
    assert compiled[case]["per_value"] <= WIDEST[case[0]][case[1]]


if __name__ == "__main__":
    print(json.dumps([(case, facts(*case)) for case in CASES]))
