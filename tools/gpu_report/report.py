"""`make gpu-report`: every GPU kernel compiled for every target, with no GPU; what its machine code takes, and what that predicts.

It runs once with each supported Triton, which writes its rows to a file (--json), and then on all files (--write): that makes
docs/gpu.md for people and docs/gpu.json for the test that fails when a kernel gets worse. Counts are facts of the machine
code; times, shares and ratios are predictions of tools/gpu_report/model.py from data sheets, and are called so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.triton_versions import TRITONS, nearest, of_installed_torch, ordered
from initperf.core.files import write_atomically
from initperf.layers.choice.gpu_devices import BY_TARGET, Device
from initperf.layers.choice.gpu_model import KEYS
from tools.gpu_report.aot import Code, Launch, access, capture
from tools.gpu_report.case import MAIN, Case
from tools.gpu_report.cases import cases
from tools.gpu_report.model import executed, main_loop, predict, resident, trips

ALSO = ("sm_86", "sm_89", "sm_120", "gfx950")  # the first case of each op only
DOCS = Path(__file__).resolve().parents[2] / "docs"
RECORD = DOCS / "gpu.json"
Row = dict[str, Any]
# What design.md's RNG contract bans from the PTX of sampling: anything but IEEE-754 operations, rounded to nearest.
BANNED = re.compile(
    r"\b(?:(?:add|sub|mul|fma|sqrt)(?!\.rn)\.[\w.]*f32|[\w.]*\.(?:approx|ftz|full)\b[\w.]*|div\.[\w.]*f32)"
)


def _kernel(launch: Launch, device: Device, turns: float) -> Row:
    code = launch.code
    loop = main_loop(code)
    return {
        "kernel": launch.kernel,
        "constants": {name: value for name, value in launch.arguments.items() if name.isupper()},
        "code": hashlib.sha256(code.text.encode()).hexdigest()[:16],
        "grid": list(launch.grid),
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "warps": code.warps,
        "resident": resident(code, device),
        "loads": {str(bits): n for bits, n in sorted(code.widths("load").items())},
        "stores": {str(bits): n for bits, n in sorted(code.widths("store").items())},
        "matrix": code.matrix,
        "float_ops": code.float_ops(),
        "instructions": len(code.instructions),
        "loop": loop[1] - loop[0] + 1 if loop else 0,
        "turns": turns,
        "warp_instructions": sum(executed(code, turns).values()) * code.warps * launch.programs,
    }


def measure(case: Case, target: str) -> Row:
    """Compile and read one case for one target."""
    device = BY_TARGET[target]
    row: Row = {"op": case.op, "label": case.label, "target": target, "device": device.name}
    began = sum(os.times()[:4])
    with capture(target) as launches:
        case.run()
    row["cpu_seconds"] = (
        sum(os.times()[:4]) - began
    )  # of this process and the assemblers that it called; 0 from a cache
    work = case.work(launches, device) if case.work else None
    turns = [trips(launches[0].code, work.program_macs, work.step_macs) if work else 1.0]
    turns += [1.0] * (len(launches) - 1)
    row["kernels"] = [_kernel(launch, device, t) for launch, t in zip(launches, turns, strict=True)]
    row["problems"] = problems(case, launches, device)
    if work:
        lanes = sum(k["warp_instructions"] for k in row["kernels"]) * device.warp
        prediction = predict(
            launches,
            device,
            nbytes=work.nbytes,
            program_macs=work.program_macs,
            step_macs=work.step_macs,
            precision=work.precision,
            conflicts=work.conflicts,
            l2_bytes=work.l2_bytes,
        )
        macs = work.units if work.unit == "MAC" else 0.0
        floor = max(work.nbytes / device.memory / 1e6, 2 * macs / device.peaks[work.precision] / 1e6)
        row |= {
            "unit": work.unit,
            "units": work.units,
            "instructions_a_unit": lanes / work.units,
            "bytes_a_unit": work.nbytes / work.units,
            "floor_us": floor,
            "predicted_us": prediction.us,
            "bound": prediction.bound,
            "times_us": prediction.times,
            "share": floor / prediction.us,
        }
        if work.dense_macs or work.dense_bytes:
            peak = max(device.peaks[work.precision] if case.op != "decode" else device.peaks["16bit"], 1e-9)
            dense = max(work.dense_bytes / device.memory / 1e6, 2 * work.dense_macs / peak / 1e6)
            row |= {"dense_us": dense, "times_dense": dense / prediction.us}
    return row


def problems(case: Case, launches: list[Launch], device: Device) -> list[str]:
    """What a kernel may not do: targets.md's list for code compiled ahead of time."""
    found = [] if launches else ["nothing was launched"]
    for launch in launches:
        code, name = launch.code, launch.kernel
        found += [f"{name}: {code.spills} spills"] if code.spills else []
        found += [f"{name}: {code.stack} bytes of stack"] if code.stack else []
        if code.shared > device.program_kib * 1024:
            found.append(f"{name}: {code.shared} bytes of shared memory, of {device.program_kib} KiB")
        elif not resident(code, device):
            found.append(f"{name}: does not fit a core")
        sampling = case.contract and name.startswith("_fill")  # with statistics, the kernels of moments come after it
        if launch.fusion is None or (sampling and launch.fusion):
            found.append(f"{name}: launched with enable_fp_fusion {launch.fusion}")
        if sampling and not device.amd and (banned := sorted(set(BANNED.findall(code.text)))):
            found.append(f"{name}: PTX with {', '.join(banned)}")
    if launches:
        for kind, bits in (("load", case.load_bits), ("store", case.store_bits)):
            bits = min(bits, case.amd_bits) if device.amd else bits
            widest = max(launches[0].code.widths(kind), default=0)
            if widest < bits:
                found.append(f"{launches[0].kernel}: widest {kind} of {widest} bits, not {bits}")
        share = wide_share(launches[0].code, min(case.load_bits, case.amd_bits) if device.amd else case.load_bits)
        if share < case.load_share:
            found.append(f"{launches[0].kernel}: only {share:.0%} of the main loop's bytes in loads so wide")
        if case.matrix and not launches[0].code.matrix:
            found.append(f"{launches[0].kernel}: no matrix instruction")
    return found


def wide_share(code: Code, bits: int) -> float:
    """Of the bytes that a thread loads in a turn of the main loop, what part comes in loads of at least `bits`."""
    first, last = main_loop(code) or (0, -1)
    loads = [access(name, "load") for name in code.instructions[first : last + 1]]
    return sum(b for b in loads if b >= bits) / sum(loads) if sum(loads) else 1.0


def key(row: Row) -> str:
    return f"{row['target']} {row['op']}: {row['label']}"


def recorded(row: Row) -> Row:
    """What `worse` compares: of each kernel programs a core, instructions, and those of its main loop; and the prediction."""
    kernels = [[kernel[name] for name in ("kernel", "resident", "instructions", "loop")] for kernel in row["kernels"]]
    return {"kernels": kernels} | ({"us": float(f"{row['predicted_us']:.4g}")} if "predicted_us" in row else {})


def worse(row: Row, before: Row) -> list[str]:
    """How a case got worse than it was when docs/gpu.json was written."""
    now = recorded(row)
    found = []
    if len(now["kernels"]) > len(before["kernels"]):
        found.append(f"{len(now['kernels'])} launches, before {len(before['kernels'])}")
    for (name, resident_now, size, loop), (_, resident_then, size_then, loop_then) in zip(
        now["kernels"], before["kernels"], strict=False
    ):
        if resident_now < resident_then:
            found.append(f"{name}: {resident_now} programs a core, before {resident_then}")
        if size > 1.05 * size_then + 8:
            found.append(f"{name}: {size} instructions, before {size_then}")
        if loop > 1.05 * loop_then + 4:
            found.append(f"{name}: {loop} instructions in the loop, before {loop_then}")
    if "us" in now and now["us"] > 1.03 * before["us"]:
        found.append(f"predicted {now['us']} us, before {before['us']}")
    return found


def _job(arguments: tuple[int, str]) -> Row:
    number, target = arguments
    case = cases()[number]
    try:
        return measure(case, target)
    except Exception as error:  # a kernel that does not compile is a row of the report, not its end
        message = f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"
        return {"op": case.op, "label": case.label, "target": target, "kernels": [], "problems": [message[:200]]}


def jobs(targets: tuple[str, ...], only: str = "", tests: bool = False) -> list[tuple[int, str]]:
    """(number of the case, target) to compile: all cases for the main targets, the first of each op for the others.

    tests: only what the tests compile.
    """
    chosen = [(i, c) for i, c in enumerate(cases()) if only in f"{c.op} {c.label}"]
    return [(i, t) for t in targets for i, c in chosen if c.first or (t in c.tested if tests else t in MAIN)]


def run(work: list[tuple[int, str]], processes: int = 2) -> list[Row]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        rows = pool.imap(_job, work, chunksize=1)
        return [_progress(row, i, len(work)) for i, row in enumerate(rows)]


def _progress(row: Row, i: int, total: int) -> Row:
    flaws = "; ".join(row["problems"])
    print(f"[{i + 1}/{total}] {row['target']} {row['op']} {row['label']} {flaws}", file=sys.stderr, flush=True)
    return row


def counts_module(rows: list[Row]) -> str:
    """initperf/layers/choice/gpu_counts.py: cycles of a core that a unit keeps each pipe busy, of the kernels that gpu_choice weighs."""
    wanted = {label: key for key, label in KEYS.items()}
    table: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        key = wanted.get(f"{row['op']} {row['label']}")
        if key and "times_us" in row:
            device = BY_TARGET[row["target"]]
            scale = device.cores * device.ghz * 1e3 / row["units"]
            busy = {p: t * scale for p, t in row["times_us"].items() if p not in ("memory", "matrix", "latency")}
            top = sorted(busy, key=lambda p: -busy[p])[:3]
            table.setdefault(row["target"], {})[key] = {p: float(f"{busy[p]:.3g}") for p in sorted(top)}
    lines = [
        '"""Cycles of a core that a unit of work keeps its busiest pipes busy. Written by `make gpu-report`; see docs/gpu.md."""',
        "",
        "COUNTS: dict[str, dict[str, dict[str, float]]] = {",
    ]
    for target, keys in table.items():
        lines.append(f'    "{target}": {{')
        for key, pipes in keys.items():
            inner = ", ".join(f'"{p}": {v}' for p, v in pipes.items())
            lines.append(f'        "{key}": {{{inner}}},')
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def compilations(rows: list[Row]) -> int:
    """Kernels that were compiled: cases that differ in sizes only share one."""
    return len({(row["target"], kernel["code"]) for row in rows for kernel in row["kernels"]})


def tested(rows: list[Row]) -> list[Row]:
    """Those that the tests compile."""
    work = {(c.op, c.label, t) for c in cases() for t in MAIN if c.first or t in c.tested}
    return [r for r in rows if (r["op"], r["label"], r["target"]) in work]


def record(version: str) -> dict[str, Row]:
    """What docs/gpu.json holds of a version: all cases of the newest one, what the tests compile of the others."""
    stored = json.loads(RECORD.read_text())["rows"]
    found: dict[str, Row] = stored[nearest(version, stored)]
    return found


def _write(paths: list[Path]) -> int:
    """The number of cases with problems."""
    from tools.gpu_report.markdown import document

    runs = [json.loads(path.read_text()) for path in paths]
    rows = {
        version: next(r["rows"] for r in runs if r["triton"] == version)
        for version in ordered(r["triton"] for r in runs)
    }
    needed = {TRITONS[0], TRITONS[-1], of_installed_torch()}
    if not needed <= set(rows):
        raise SystemExit(f"Expected rows of Triton {', '.join(ordered(needed))}. Got {', '.join(rows)}.")
    newest = list(rows)[-1]
    parts = []
    for version, found in rows.items():
        kept = [r for r in (found if version == newest else tested(found)) if r["op"] != "init"]
        lines = ",\n".join(f"{json.dumps(key(r))}: {json.dumps(recorded(r))}" for r in kept)
        parts.append(f'"{version}": {{\n{lines}\n}}')
    DOCS.mkdir(exist_ok=True)
    write_atomically(RECORD, f'{{"torch": "{torch.__version__}", "rows": {{\n{",".join(parts)}\n}}}}\n')
    write_atomically(DOCS.parent / "initperf/layers/choice/gpu_counts.py", counts_module(rows[newest]))
    write_atomically(DOCS / "gpu.md", document(rows, torch.__version__))
    return sum(bool(r["problems"]) for found in rows.values() for r in found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(BY_TARGET), help="all, if not given")
    parser.add_argument("--only", default="", help="cases whose op and label contain this")
    parser.add_argument("--tests", action="store_true", help="only what the tests compile, for the main targets")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument(
        "--write", type=Path, nargs="+", help="compile nothing; write the pages from files that --json wrote"
    )
    options = parser.parse_args(arguments)
    if options.write:
        return 1 if _write(options.write) else 0
    began = time.perf_counter()
    targets = options.targets or (MAIN if options.tests else MAIN + ALSO)
    rows = run(jobs(tuple(targets), options.only, options.tests), options.processes)
    seconds = time.perf_counter() - began
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}))
    before = record(triton.__version__) if RECORD.exists() else {}
    for row in rows:
        if key(row) in before and (found := worse(row, before[key(row)])):
            print(f"worse than recorded: {key(row)}: {'; '.join(found)}")
    bad = [r for r in rows if r["problems"]]
    for row in bad:
        print(f"{key(row)}: {'; '.join(row['problems'])}")
    print(
        f"Triton {triton.__version__}: {len(rows)} cases, {compilations(rows)} compilations, {len(bad)} with problems, "
        f"{seconds:.0f} s"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
