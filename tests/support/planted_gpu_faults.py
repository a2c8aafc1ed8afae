"""Compiles kernels with planted faults for sm_90 and writes what gpu_static says of each to a JSON file. Run without TRITON_INTERPRET."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from initperf.kernels.gpu.candidates import decode
from initperf.kernels.gpu.sampling import sample
from initperf.kernels.gpu.sparse import rows as sparse_matmul
from tools.gpu_report import report
from tools.gpu_report.aot import changed
from tools.gpu_report.case import BF16, F32, Case, replaced
from tools.gpu_report.cases import sample_case
from tools.gpu_report.product_cases import decode_case, spmm_case


class With:
    """A kernel launched with other options than its launcher gives."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.kernel[grid](*args, **kwargs | self.options)


def row(case: Case, *faults: Any) -> dict[str, Any]:
    with ExitStack() as stack:
        for fault in faults:
            stack.enter_context(fault)
        return report.measure(case, "sm_90")


if __name__ == "__main__":
    decoding, product, normal = decode_case(1, BF16, 0.1), spmm_case(256, F32, 0.1), sample_case("normal", F32, 1 << 20)
    slow = changed(
        decode._decode,
        "even += value * x.to(tl.float32)",
        "even += value * tl.exp2(tl.sqrt(tl.exp2(x.to(tl.float32))))",
    )
    wrong = changed(sample._normal, "tl.sqrt_rn(", "tl.sqrt(")
    unaligned = changed(sparse_matmul._sparse_matmul, "+ rb, mask=inside)", "+ rb + 1, mask=inside)")
    rows = {
        "approximate": row(normal, replaced(sample, _normal=wrong)),
        "slow": row(decoding, replaced(decode, _decode=slow)),
        "spilling": row(decoding, replaced(decode, _decode=With(decode._decode, maxnreg=24))),
        "narrow": row(product, replaced(sparse_matmul, _sparse_matmul=unaligned)),
        "fused": row(normal, replaced(sample, _fill=With(sample._fill, enable_fp_fusion=True))),
        "undecided": row(decoding, replaced(decode, _decode=With(decode._decode, enable_fp_fusion=None))),
        "sound": row(decoding),
        "sound product": row(product),
    }
    Path(sys.argv[1]).write_text(json.dumps(rows))
