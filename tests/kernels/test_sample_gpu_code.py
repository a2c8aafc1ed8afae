"""Machine code of what initperf.init and `initialize` launch for tensors on a GPU: all kinds and dtypes, IEEE operations as written, few instructions, wide stores, no spills."""

import pytest
import torch

from initperf import init
from initperf.core.checks import FLOATS

pytest.importorskip("triton")
from initperf.kernels import contract  # noqa: E402
from tools.gpu_report import init_cases  # noqa: E402
from tools.gpu_report.case import MAIN, SHORT  # noqa: E402

KINDS = {
    contract.UNIFORM: "uniform_",
    contract.NORMAL: "normal_",
    contract.TRUNC_CENTER: "trunc_normal_ of 2",
    contract.TRUNC_NORMAL: "trunc_normal_ of 3",
    contract.TRUNC_TAIL: "trunc_normal_ of a tail",
    contract.TRUNC_FAR: "trunc_normal_ far out",
    contract.TRUNC_NARROW: "trunc_normal_ narrow",
}
# Operations as the formulas of initperf/rng/contract.py write them, a word (of NORMAL: a pair of words): Horner's rule takes as
# many fmas as its degree; log: degree 7, and 3 more.
LOG = 10
FMAS = {
    contract.UNIFORM: 1,
    contract.NORMAL: LOG + 4 + 4 + 2,
    contract.TRUNC_NORMAL: 2 + LOG + 8 + 8 + 1,
    contract.TRUNC_CENTER: 2 + LOG + 6 + 1,
    contract.TRUNC_TAIL: 2 + LOG + 8 + 8 + 1,
    contract.TRUNC_FAR: 1 + LOG + 7 + 1,
    contract.TRUNC_NARROW: 7 + 1,
}
SQUARE_ROOTS = {contract.NORMAL: 1, contract.TRUNC_NORMAL: 1, contract.TRUNC_TAIL: 1}
WIDEST = {contract.UNIFORM: 24.0, contract.NORMAL: 45.0}  # machine instructions a value of float32 on sm_90, at most
CASES = [(kind, dtype) for kind in KINDS for dtype in FLOATS]


def case_id(case):
    return f"{KINDS[case[0]]} {SHORT[case[1]]}"


@pytest.fixture(scope="module")
def launches(gpu_rows):
    """(kind, dtype) -> the launch on sm_90 that the function of initperf.init makes."""
    rows = {case: gpu_rows["sm_90", "init", case_id(case)] for case in CASES}
    assert all(len(row["kernels"]) == 1 for row in rows.values())
    return {case: row["kernels"][0] for case, row in rows.items()}


def values(kernel):
    """How many a thread samples."""
    return kernel["constants"]["TILES"] * 1024 // (kernel["warps"] * 32)


def test_every_function_that_samples_on_a_tensors_device_is_compiled():
    names = {name for name in init.__all__ if name.endswith("_") and not name.startswith("_")}
    by_value_or_on_the_cpu = {"constant_", "dirac_", "eye_", "ones_", "zeros_", "orthogonal_"}
    compiled = {name.split()[0] for name in (*init_cases.FUNCTIONS, *init_cases.OTHERS)}
    assert names - by_value_or_on_the_cpu == {name for name in compiled if name.endswith("_")}


def test_every_kind_is_launched_in_every_dtype(gpu_rows, launches):
    words = [k["constants"]["KIND"] for k in gpu_rows["sm_90", "init", "sparse_"]["kernels"]]
    assert words == [contract.NORMAL, contract.BITS]
    assert {contract.BITS, *KINDS} == set(range(8))
    for (kind, _), kernel in launches.items():
        assert (kernel["kernel"], kernel["constants"]["KIND"]) == ("_fill", kind)
        assert not kernel["constants"]["MASKED"]


def test_a_model_is_initialized_in_one_launch_and_measured_in_two_more(gpu_rows):
    kernels = [k["kernel"] for k in gpu_rows["sm_90", "init", "initialize with stats"]["kernels"]]
    assert kernels[0] == "_fill_many"
    assert set(kernels[1:]) == {"_read", "combine"}
    for target in MAIN:  # the same kernel for any list of tensors
        assert [k["kernel"] for k in gpu_rows[target, "sample_many", "any list"]["kernels"]] == ["_fill_many"]


def test_nothing_that_is_launched_has_a_flaw(gpu_rows):
    """No spill, no stack, and in PTX only operations rounded to nearest."""
    rows = [r for (_, op, _), r in gpu_rows.items() if op in ("init", "sample", "sample_many")]
    assert len(rows) > len(CASES)
    assert not {(r["target"], r["label"]): r["problems"] for r in rows if r["problems"]}


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_float_operation_is_one_rounded_ieee_operation(launches, case):
    kernel = launches[case]
    assert all(".rn" in name for name in kernel["float_ops"]), kernel["float_ops"]
    formulas = values(kernel) // (2 if case[0] == contract.NORMAL else 1)
    assert kernel["float_ops"].get("fma.rn.f32", 0) == FMAS[case[0]] * formulas
    assert kernel["float_ops"].get("sqrt.rn.f32", 0) == SQUARE_ROOTS.get(case[0], 0) * formulas


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_stores_are_128_bits_wide(launches, case):
    kernel = launches[case]
    assert set(kernel["stores"]) == {"128"}
    assert kernel["stores"]["128"] * 16 == values(kernel) * case[1].itemsize


@pytest.mark.parametrize("kind", WIDEST, ids=lambda kind: KINDS[kind])
def test_instructions_a_value_stay_within_the_target(launches, kind):
    kernel = launches[kind, torch.float32]
    assert kernel["instructions"] / values(kernel) <= WIDEST[kind]
