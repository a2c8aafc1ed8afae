"""`initperf doctor`: what this machine has, which backend runs each op, whether it agrees with the reference, what is missing."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import initperf
from initperf import __version__, rng
from initperf.cli.selfcheck import agrees
from initperf.core import ops
from initperf.core.extras import installation
from initperf.core.tables import NONE, Table, joined, percent, size
from initperf.layers.choice import table as choice
from initperf.layers.inference.write_watch import why_not

PACKAGES = ("torch", "numba", "triton", "numpy", "safetensors", "matplotlib", "rich", "typer")
VECTORS = {  # LLVM's feature names, and what people call them
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512bf16": "AVX-512 BF16",
    "amx-tile": "AMX",
    "amx-bf16": "AMX BF16",
    "neon": "NEON",
    "sve": "SVE",
}


def examine(check: bool = True) -> dict[str, Any]:
    """Everything doctor shows, as plain data. `check` runs each op's kernels against the reference (compiling what is not cached)."""
    for name in initperf.__all__:  # whose modules enter their ops into ops.MODULES
        getattr(initperf, name)
    found: dict[str, Any] = {
        "versions": {"initperf": __version__, "RNG contract": str(rng.VERSION), "Python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "machine": _machine(),
        "unwatched": why_not(),
        "threads": {"torch": torch.get_num_threads(), "numba": _numba_threads()},
        "gpus": _gpus(),
        "ops": {name: _op(name, check) for name in sorted(ops.MODULES)},
        "break_even": _break_even(),
        "cache": _cache(),
    }
    found["advice"] = _advice(found)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cores": cores,
        "vectors": _vectors(),
        "compiled_for": _compiled_for(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _vectors() -> list[str]:
    """Vector instructions that numba's compiler may use; without numba, those that torch names."""
    if find_spec("llvmlite") is None:
        return [torch.backends.cpu.get_cpu_capability()]
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return [name for feature, name in VECTORS.items() if features.get(feature)]


def _compiled_for() -> str | None:
    """The processor that kernels are compiled for, which NUMBA_CPU_NAME and its like may name."""
    if find_spec("numba") is None:
        return None
    from initperf.kernels.cpu.core.target import has_avx512, target

    return f"{target()[1]}, {'with' if has_avx512() else 'without'} AVX-512"


def _numba_threads() -> int | None:
    if not ops.usable("numba"):
        return None
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _gpus() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": about.name,
                "memory": about.total_memory,
                "target": getattr(about, "gcnArchName", None) or f"sm_{about.major}{about.minor}",
            }
        )
    return found


def _other_accelerator() -> str:
    """The type of an accelerator that torch uses and that is no CUDA or ROCm device; empty if there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "" if found is None or found.type == "cuda" else found.type


def _cache() -> dict[str, Any] | None:
    """Where compiled CPU kernels are kept."""
    if not ops.usable("numba"):
        return None
    from initperf.kernels.cpu.core.jit import CACHE_DIR

    files = [p for p in CACHE_DIR.rglob("*") if p.is_file()] if CACHE_DIR.is_dir() else []
    above = next(p for p in (CACHE_DIR, *CACHE_DIR.parents) if p.exists())
    return {
        "folder": str(CACHE_DIR),
        "writable": os.access(above, os.W_OK),
        "files": len(files),
        "bytes": sum(p.stat().st_size for p in files),
    }


def _op(name: str, check: bool) -> dict[str, Any]:
    """Backends of one op by device; `equal`: whether they agree with the reference (None: not checked)."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found: dict[str, Any] = {"backend": {device: ops.backend_of(name, device) for device in devices}, "equal": None}
    if not check:
        return found
    start = time.perf_counter()
    try:
        found["equal"] = agrees(name, found["backend"])
    except Exception as error:  # a doctor reports what is broken, whatever it is
        found |= {"equal": False, "error": f"{type(error).__name__}: {error}"}
    found["seconds"] = round(time.perf_counter() - start, 3)
    return found


def _break_even() -> dict[str, Any]:
    """Densities below which the sparse kernels run on the CPU: float32, by product, batch rows and weights of a layer."""
    threads = torch.get_num_threads()
    return {
        "mode": choice._mode,
        "measured_here": choice.measured(threads) is not None,
        "threads": threads,
        "rows": choice.ROWS,
        "weights": choice.WEIGHTS,
        "products": {
            kind: [
                [choice.break_even(kind, rows, weights, 4, threads) for weights in choice.WEIGHTS]
                for rows in choice.ROWS
            ]
            for kind in choice.KINDS
        },
    }


def _break_even_table(found: dict[str, Any]) -> Table:
    heads = ["product", "batch", *(f"{weights:,} weights" for weights in found["weights"])]
    lines = [
        [kind, str(rows), *(percent(limit) for limit in limits)]
        for kind, by_rows in found["products"].items()
        for rows, limits in zip(found["rows"], by_rows, strict=True)
    ]
    origin = (
        f"measured on this machine with {found['threads']} threads"
        if found["measured_here"]
        else "built in and cautious: `initperf doctor --calibrate` measures this machine's in a minute or two"
    )
    return Table("Sparse kernels run below these densities (float32)", heads, lines, [f"The figures are {origin}."])


def _advice(found: dict[str, Any]) -> list[str]:
    """What is missing or wrong, and what to do about it."""
    said = []
    versions, described = found["versions"], found["ops"]
    if os.environ.get("INITPERF_BACKEND") == "reference":
        said.append("INITPERF_BACKEND=reference is set: every op runs in plain torch, correct but slow. Unset it.")
    elif lacking := ops.lacking("cpu"):
        said.append(lacking)
    elif slow := [name for name, op in described.items() if op["backend"]["cpu"] == "reference"]:
        said.append(f"{joined(slow)}: no CPU kernel in this version; plain torch runs instead.")
    if found["break_even"]["mode"] != "auto":
        said.append(
            f"INITPERF_PRODUCTS={found['break_even']['mode']} is set: the break-even densities below are not used. Unset it."
        )
    if found["gpus"] and (lacking := ops.lacking("cuda")):
        said.append(lacking)
    if (other := _other_accelerator()) and (lacking := ops.lacking(other)):
        said.append(lacking)
    if versions["matplotlib"] is None:
        said.append(f"matplotlib is not installed: no figures and no reports. Remedy: {installation('report')}.")
    if not found["gpus"] and Path("/dev/nvidia0").exists():
        said.append(
            f"There is an NVIDIA GPU that torch {torch.__version__} cannot use: install a CUDA build (pytorch.org)."
        )
    if found["cache"] and not found["cache"]["writable"]:
        said.append(
            "The cache folder cannot be written, so every process compiles its kernels: set INITPERF_CACHE_DIR to a folder."
        )
    if found["threads"]["torch"] < found["machine"]["cores"]:
        said.append(
            f"torch uses {found['threads']['torch']} of {found['machine']['cores']} cores, and the kernels follow it: "
            "torch.set_num_threads, or OMP_NUM_THREADS."
        )
    if wrong := [name for name, op in described.items() if op["equal"] is False]:
        said.append(
            f"{joined(wrong)}: not equal to the reference here. Delete the cache folder and try again; if it stays, please report it "
            "with `initperf doctor --json`; INITPERF_BACKEND=reference works meanwhile."
        )
    return said


def tables(found: dict[str, Any]) -> list[Table]:
    """What `examine` found, for reading."""
    machine, threads, cache = found["machine"], found["threads"], found["cache"]
    about = [[name, version or "not installed"] for name, version in found["versions"].items()]
    about += [
        ["system", machine["os"]],
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['vectors'])}"],
        ["kernels are compiled for", machine["compiled_for"] or NONE],
        ["threads", f"torch {threads['torch']}, numba {NONE if threads['numba'] is None else threads['numba']}"],
        [
            "unchanged weights are kept",
            f"no ({found['unwatched']})" if found["unwatched"] else "yes (the kernel tells of writes)",
        ],
        ["GPU", "; ".join(f"{g['name']} ({g['target']}, {size(g['memory'])})" for g in found["gpus"]) or "none"],
    ]
    if cache:
        about.append(["compiled kernels", f"{cache['folder']} ({cache['files']} files, {size(cache['bytes'])})"])
    words = {True: "yes", False: "NO", None: "not checked"}
    rows = [
        [name, op["backend"]["cpu"], op["backend"].get("cuda", NONE), op.get("error") or words[op["equal"]]]
        for name, op in found["ops"].items()
    ]
    found_tables = [
        Table("This machine", ["", ""], about, []),
        Table("Ops", ["op", "CPU", "GPU", "equals the reference"], rows, found["advice"] or ["Nothing is missing."]),
    ]
    return found_tables if threads["numba"] is None else [*found_tables, _break_even_table(found["break_even"])]
