"""`make gpu`: the tests and the benchmarks on this machine's GPU, in one file to send back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from initperf.core.files import write_atomically


def machine() -> dict[str, Any]:
    """The GPU and the versions that a result depends on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(),
        "arch": getattr(properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"),
        "cores": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "numba", "numpy")},
    }


def pytest(*arguments: str) -> dict[str, Any]:
    """A run of pytest: its exit status and the end of what it printed, which also goes to the screen."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        for line in run.stdout or ():
            print(line, end="")
            lines.append(line)
    return {"status": run.returncode, "output": "".join(lines[-400:])}


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "Expected a GPU that torch can use (CUDA or ROCm). Got none: torch.cuda.is_available() is False.",
            file=sys.stderr,
        )
        return 1
    with tempfile.TemporaryDirectory() as folder:
        timings = Path(folder) / "timings.json"
        result = {"machine": machine(), "tests": pytest("tests", "-q")}
        result["benchmarks"] = pytest("benchmarks", "--benchmark-only", f"--benchmark-json={timings}")
        if timings.exists():
            result["timings"] = json.loads(timings.read_text())["benchmarks"]
    write_atomically("gpu-run.json", json.dumps(result))
    print("Wrote gpu-run.json: the file to send back.")
    return max(result["tests"]["status"], result["benchmarks"]["status"])


if __name__ == "__main__":
    sys.exit(main())
