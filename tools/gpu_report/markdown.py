"""The rows of gpu_static as docs/gpu.md: all figures of the newest Triton, and where the others differ."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.triton_versions import BROUGHT
from initperf.layers.choice.gpu_devices import BY_TARGET
from tools.gpu_report.model import LATENCY, OVERLAP

Row = dict[str, Any]

HEAD = """# GPU kernels, read without a GPU

Written by `make gpu-report` with torch {torch}: {count} cases compiled with each Triton that a supported torch brings
({tritons}). Nothing here was measured on a GPU. The tables by device are of Triton {newest}; the section "Other Tritons" shows
where the others differ.

**Counted**, facts of the machine code: registers and warps (most that fit one core), shared memory, bits of the widest load
and store of a thread, matrix instructions, instructions of the main loop and, over the whole launch, lane-instructions a unit;
bytes a unit are what must pass through memory once.
**Predicted**: microseconds, share of the floor and speed against dense. The floor is the larger of bytes over bandwidth and
operations over rate. A prediction adds, in a {overlap}-norm, the time of every pipe (counted instructions over its rate), of
the first-level cache (with the expected bank conflicts of random columns), of the second-level cache, of memory, and of loads that nothing hides
({latency} cycles each). Launches are not in it: about 3 us each, on the dense side as well. Dense is the product with the
pre-masked weight at its own floor, which no library reaches: so "x dense" is a cautious figure where dense is compute-bound.
Both sides assume that the weight comes from memory; one that stays in the second-level cache gains less from fewer bytes.

Figures of the devices, from their data sheets:

| device | target | cores | GHz | TB/s | TFLOP/s float32, TF32, 16 bits | source |
| --- | --- | --- | --- | --- | --- | --- |
{devices}

What must hold, and `tests/kernels/test_gpu_static.py` holds: no spill, no stack, shared memory within the device, 128-bit loads and
stores wherever strides divide by 8, a matrix instruction wherever there is a 16-bit dot, and in sampling only IEEE-754
operations rounded to nearest. {flaws} The functions of `initperf.init` and `initialize` are compiled as they launch, in every
dtype and kind of distribution, and counted among the cases; their kernels are those of sample and sample_many below.

## Other Tritons
{others}

## What runs
`initperf doctor --gpu h100` (any device below; `--dtype`, `--tf32`, `--ticket FILE` for the masks of a ticket) prints which kernel
would run and why; layers on a GPU decide by the same prediction (initperf/layers/choice/gpu_model.py), in which dense is always a candidate.
- y and dx of masked dense storage are torch's own products with the weight, zero where pruned. A kernel that masks the weight on
  its way to the matrix unit reads no fewer bytes than that, and an earlier one was predicted to reach 0.07 to 0.26 of the dense
  speed on NVIDIA's devices in bfloat16 and 0.69 on gfx942, where it spilled: it was taken out.
- dW of masked storage is a product in tiles, which skips tiles without a survivor, applies the mask to the finished tile, and can
  add into a gradient (`into=`). Autograd does not: only .backward() accumulates, and torch.autograd.grad looks the same from inside.
- Compressed layers run rows (y, dx), rows at survivors (dvalues, float32) and tiles at survivors (dvalues, 16 bits). Decode and
  blocks have packed forms of their own and are called by hand: kernels/gpu/candidates/decode.py, block_matmul.py.

## On a GPU
- `make gpu` runs the tests and the benchmarks on the machine's GPU (CUDA or ROCm) and writes `gpu-run.json`, the one file to send
  back. `benchmarks/gpu/bench_gpu.py` times every kernel against torch on the same card, N launches and one synchronization a round.
- `python -m benchmarks.gpu.tune` times the entries of the TILES tables that differ by target, and prints the rows to put there:
  run it on a new card, put what it prints into the card's row (a new one, or its family's in kernels/gpu/targets.py), and run
  `make gpu-report`, which refuses a tile that spills.
"""

DIFFERS = 0.2
COLUMNS = (
    "op", "case", "registers", "warps a core", "shared KiB", "load / store bits", "matrix instruction", "loop",
    "instructions a unit", "bytes a unit", "floor us", "predicted us", "share of floor", "bound by", "x dense",
)  # fmt: skip


def document(runs: dict[str, list[Row]], torch: str) -> str:
    """The whole page, of rows by Triton, the newest last."""
    devices = "\n".join(
        f"| {d.name} | {d.target} | {d.cores} | {d.ghz} | {d.memory} | "
        f"{', '.join(str(d.peaks[p]) for p in ('float32', 'tf32', '16bit'))} | {d.source} |"
        for d in BY_TARGET.values()
    )
    newest, rows = list(runs.items())[-1]
    bad = [(triton, r) for triton, found in runs.items() for r in found if r["problems"]]
    flaws = "With every Triton all do." if not bad else "Not yet:\n" + "\n".join(
        f"- {triton}, {r['target']}, {r['op']}, {r['label']}: {'; '.join(r['problems'])}" for triton, r in bad
    ) + "\n\n"  # fmt: skip
    parts = [
        HEAD.format(
            count=len(rows),
            newest=newest,
            tritons=", ".join(runs),
            torch=torch,
            overlap=OVERLAP,
            latency=LATENCY,
            devices=devices,
            flaws=flaws,
            others=_others(runs),
        )
    ]
    rows = [r for r in rows if r["op"] != "init"]
    for target in dict.fromkeys(r["target"] for r in rows):
        parts.append(f"\n## {BY_TARGET[target].name} ({target})\n\n{_line(COLUMNS)}\n{_line(['---'] * len(COLUMNS))}\n")
        parts += [_line(_cells(r)) + "\n" for r in rows if r["target"] == target and r["kernels"]]
    return "".join(parts)


def _others(runs: dict[str, list[Row]]) -> str:
    """A line a Triton, and the cases whose predicted times differ by more than DIFFERS."""
    by_key = {t: {(r["target"], r["op"], r["label"]): r for r in rows if r["kernels"]} for t, rows in runs.items()}
    newest = list(by_key.values())[-1]
    titles = (
        "Triton",
        "comes with torch",
        "compiled",
        "failed",
        "spilled",
        "registers",
        "instructions",
        "predicted time",
    )
    lines = [_line(titles), _line(["---"] * len(titles))]
    for triton, rows in by_key.items():
        kernels = [
            pair
            for k, row in rows.items()
            if k in newest
            for pair in zip(row["kernels"], newest[k]["kernels"], strict=False)
        ]
        times = [
            row["predicted_us"] / newest[k]["predicted_us"]
            for k, row in rows.items()
            if "predicted_us" in newest.get(k, {})
        ]
        torches = ", ".join(version for version, brought in BROUGHT.items() if brought == triton)
        lines.append(_line([
            triton, torches, len({(k[0], kernel["code"]) for k, row in rows.items() for kernel in row["kernels"]}),
            len(runs[triton]) - len(rows), sum(k["spills"] > 0 for row in rows.values() for k in row["kernels"]),
            *(f"{median(a[name] / b[name] for a, b in kernels):.2f}" for name in ("registers", "instructions")),
            f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})",
        ]))  # fmt: skip
    lines.append(
        f"\nThe last three are against {list(runs)[-1]}: medians, and of time the extremes, where it is predicted."
    )
    lines += [
        "",
        f"Cases whose predicted time differs by more than {DIFFERS:.0%} (registers, warps a core, microseconds):",
        "",
    ]
    lines += [_line(["target", "op", "case", *runs]), _line(["---"] * (3 + len(runs)))]
    for k in newest:
        found = [rows.get(k) for rows in by_key.values()]
        times = [row["predicted_us"] for row in found if row and "predicted_us" in row]
        if times and max(times) > (1 + DIFFERS) * min(times):
            lines.append(_line([*k, *map(_short, found)]))
    return "\n".join(lines)


def _short(row: Row | None) -> str:
    if row is None:
        return "fails"
    main = row["kernels"][0]
    return f"{main['registers']}, {main['resident'] * main['warps']}, {row['predicted_us']:.1f}"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _cells(row: Row) -> list[str]:
    kernels = row["kernels"]
    main = kernels[0]

    def widest(kind: str) -> str:
        return max(main[kind], key=int, default="-")

    def number(name: str, digits: int) -> str:
        return f"{row[name]:.{digits}f}" if name in row else ""

    unit = f" / {row['unit']}" if "unit" in row else ""
    return [
        row["op"],
        row["label"],
        ", ".join(str(k["registers"]) for k in kernels),
        ", ".join(str(k["resident"] * k["warps"]) for k in kernels),
        ", ".join(f"{k['shared'] / 1024:.0f}" for k in kernels),
        f"{widest('loads')} / {widest('stores')}",
        ", ".join(m.split(".F32")[0] for m in main["matrix"]) or "-",
        str(main["loop"] or "-"),
        number("instructions_a_unit", 2) + unit,
        number("bytes_a_unit", 3),
        number("floor_us", 2),
        number("predicted_us", 2),
        number("share", 2),
        row.get("bound", ""),
        number("times_dense", 2),
    ]
