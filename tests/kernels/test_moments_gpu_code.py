"""Machine code of both moment kernels, compiled ahead of time for every main target: no GPU is needed."""

import pytest

pytest.importorskip("triton")
from initperf.kernels.gpu.moments.moments import TILES  # noqa: E402
from tools.gpu_report.case import MAIN  # noqa: E402

LIST, COLUMNS = "a list of 150", "float32, a channel"


@pytest.fixture(params=MAIN)
def target(request):
    return request.param


def test_no_register_spills_and_no_stack_is_used(gpu_rows, target):
    rows = [r for (t, op, _), r in gpu_rows.items() if (t, op) == (target, "moments")]
    kernels = [k for r in rows for k in r["kernels"]]
    classes = {(k["constants"]["WIDE"], k["constants"]["ACROSS"]) for k in kernels if k["kernel"] == "_read"}
    assert classes == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert not [k for k in kernels if k["spills"] or k["stack"]]


def test_a_list_of_150_tensors_takes_one_launch_a_class_and_one_that_combines(gpu_rows, target):
    assert [k["kernel"] for k in gpu_rows[target, "moments", LIST]["kernels"]] == ["_read", "_read", "combine"]
    assert [k["kernel"] for k in gpu_rows[target, "moments", COLUMNS]["kernels"]] == ["_read", "combine"]


@pytest.mark.parametrize("label", [LIST, COLUMNS])
def test_aligned_values_come_in_128_bit_loads_and_every_value_is_loaded_once(gpu_rows, target, label):
    warp = 64 if target == "gfx942" else 32
    for kernel in gpu_rows[target, "moments", label]["kernels"]:
        if kernel["kernel"] != "_read":
            continue
        wide = kernel["constants"]["WIDE"]
        tile = TILES[wide + 2 * kernel["constants"]["ACROSS"]]
        values = tile["rows"] * tile["columns"] // (tile["warps"] * warp)  # of a thread
        loads = {int(bits): count for bits, count in kernel["loads"].items()}
        if wide:
            # Two paths, aligned and not, of which one is taken. What is left of 64 bits is the plan of the tensor.
            assert loads[128] == values // 2, kernel
        else:
            assert loads[128] >= values // 4, kernel
            assert loads[128] <= values // 4 + 2 * (values // 8), kernel  # float32; bfloat16 and float16
            assert loads[32] == values, kernel
            assert loads[16] <= 4 * values, kernel  # both of 16 bits; in columns aligned too
