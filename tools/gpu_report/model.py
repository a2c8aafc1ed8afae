"""Prediction, not measurement: how long counted instructions and bytes take on a GPU whose data sheet is known.

Every resource of a core (issue, each pipe, the first-level cache, the matrix unit), the memory, and the latency of loads that
nothing hides, is busy for a time of its own. They overlap, but not perfectly: the prediction is the 4-norm of those times,
which is the longest where one stands out, and 19% more where two are equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from initperf.layers.choice.gpu_devices import Device
from tools.gpu_report.aot import Code, Launch, access

LATENCY = 600  # cycles of a load from memory; about 270 to 800 from the second-level cache to memory on these devices
OVERLAP = 4


@dataclass(frozen=True)
class Prediction:
    """Microseconds of each resource, and of the whole."""

    times: dict[str, float]
    us: float

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda name: self.times[name])


def macs(name: str, warp: int) -> int:
    """Multiply-adds of one warp's instruction; 0 for those of tcgen05, whose shape is not in the name."""
    if match := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return math.prod(map(int, match.groups())) // 4  # four warps share it
    if match := re.match(r"v_s?mf\w*?_(\d+)x(\d+)x(\d+)", name):
        return math.prod(map(int, match.groups()))
    if match := re.match(r"[HD]MMA\.(16816|1688|1684|884)", name):
        return {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4, "884": 8 * 8 * 4}[match.group(1)]
    if match := re.match(r"[HD]MMA\.(\d+)x(\d+)x(\d+)", name):
        return math.prod(map(int, match.groups()))
    base = name.split(".")[0]
    if base == "FFMA2" or base.startswith(("v_pk_fma_f32", "v_pk_mul_f32")):
        return 2 * warp
    if base in ("FFMA", "FHFMA", "DFMA") or base.startswith(("v_fma_f", "v_fmac_f", "v_mul_f32")):
        return warp
    return 0


def main_loop(code: Code) -> tuple[int, int] | None:
    """The innermost loop with most multiply-adds or, where there are none, with most instructions."""
    warp = 64 if code.target.startswith("gfx") else 32
    inner = [a for a in code.loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in code.loops)]

    def weight(loop: tuple[int, int]) -> tuple[int, int]:
        body = code.instructions[loop[0] : loop[1] + 1]
        return sum(macs(n, warp) for n in body), sum(bool(re.match("UTC.*MMA", n)) for n in body) * 1000 + len(body)

    return max(inner, key=weight, default=None)


def trips(code: Code, program_macs: float, step_macs: float = 0) -> float:
    """How often a program runs its main loop; step_macs: multiply-adds of one turn, where no instruction tells."""
    loop = main_loop(code)
    if loop is None or not program_macs:
        return 1.0
    warp = 64 if code.target.startswith("gfx") else 32
    turn = sum(macs(n, warp) for n in code.instructions[loop[0] : loop[1] + 1]) * code.warps
    return program_macs / (turn or step_macs or program_macs)


def executed(code: Code, turns: float) -> Counter[str]:
    """Instructions that one warp executes: the main loop `turns` times, all else once."""
    loop = main_loop(code) or (0, -1)
    inside = Counter(code.instructions[loop[0] : loop[1] + 1])
    counts = Counter(code.instructions) - inside
    return counts + Counter({name: n * turns for name, n in inside.items()})


def resident(code: Code, device: Device) -> int:
    """Programs on one core at a time: what registers, shared memory, warps and the device allow."""
    if device.amd:
        by_registers = 4 * min(8, 512 // (math.ceil(max(code.registers, 1) / 8) * 8)) // code.warps
    else:
        by_registers = 4 * (65536 // 4 // (math.ceil(max(code.registers, 1) * 32 / 256) * 256)) // code.warps
    reserved = 0 if device.amd else 1024  # a program, of the system's own
    by_shared = device.shared_kib * 1024 // (code.shared + reserved) if code.shared + reserved else device.programs
    return min(by_registers, by_shared, device.warps // code.warps, device.programs)


def _pipes(name: str, device: Device, conflicts: dict[int, float]) -> dict[str, float]:
    """Cycles that one warp's instruction keeps each resource of a core busy."""
    base = name.split(".")[0]
    bits = access(name, "load") or access(name, "store")
    if device.amd:
        if bits:
            return {"l1": max(1.0, bits * device.warp / 8 / 64) * conflicts.get(bits, 1.0)}
        if base.startswith("ds_"):
            return {
                "shared": max(1.0, (128 if "b128" in base else 64 if "b64" in base else 32) * device.warp / 8 / 128)
            }
        if "mfma" in base or "smfmac" in base:
            return {}
        return {"vector": 1.0} if base.startswith("v_") else {"scalar": 0.25}
    busy = {"issue": 0.25}
    if base in ("FFMA", "FMUL", "FADD", "FFMA2", "FADD2", "FMUL2", "FHFMA", "FHADD"):
        busy["fma"] = 0.5 if device.target == "sm_80" else 0.25
    elif base in ("IMAD", "HFMA2", "HADD2", "HMUL2"):
        busy["fma"] = 0.5
    elif base in ("MUFU", "I2F", "F2I", "I2FP", "F2F", "POPC"):
        busy["special"] = 2.0
    elif base.startswith("D") and base in ("DFMA", "DADD", "DMUL", "DSETP"):
        busy["double"] = 0.5
    elif bits or base in ("LDS", "STS", "LDL", "STL", "LDSM", "STSM", "SHFL", "ATOM", "ATOMG", "ATOMS", "RED"):
        wide = bits or (128 if "128" in name or base in ("LDSM", "STSM") else 64 if ".64" in name else 32)
        busy["l1"] = max(1.0, wide * 32 / 8 / 128) * (conflicts.get(wide, 1.0) if bits else 1.0)
    elif not base.startswith(("U", "BRA", "BAR", "S2", "CS2", "DEPBAR", "WARP", "NOP", "EXIT", "HGMMA", "HMMA", "LDC")):
        busy["integer"] = 0.5
    return busy


def predict(
    launches: list[Launch],
    device: Device,
    *,
    nbytes: float,
    program_macs: float = 0,
    step_macs: float = 0,
    precision: str = "16bit",
    conflicts: dict[int, float] | None = None,
    l2_bytes: float = 0,
) -> Prediction:
    """Time of the launches. nbytes: read and written in memory, each once. program_macs: of one program of the first launch.

    conflicts: bits of a load -> how many times its bank conflicts lengthen it. l2_bytes: between the second-level cache and
    the cores, taken at 64 bytes a cycle and core.
    """
    times: Counter[str] = Counter()
    for i, launch in enumerate(launches):
        code = launch.code
        turns = trips(code, program_macs if i == 0 else 0, step_macs)
        busiest = math.ceil(launch.programs / device.cores)  # programs of the core that has most
        for name, count in executed(code, turns).items():
            for pipe, cycles in _pipes(name, device, conflicts or {}).items():
                times[pipe] += count * cycles * code.warps * busiest / device.ghz / 1e3
        if i == 0 and code.matrix:
            rate = device.peaks[precision] * 1e6 / 2 / device.cores  # multiply-adds a microsecond
            times["matrix"] += program_macs * busiest / rate
        rounds = math.ceil(launch.programs / (device.cores * max(resident(code, device), 1)))
        ahead = max(1, launch.arguments.get("num_stages", 1))
        hidden = 3 if any(n.startswith(("LDGSTS", "UTMALDG")) for n in code.instructions) else ahead
        times["latency"] += rounds * (1 + turns) * LATENCY / hidden / device.ghz / 1e3
    times["memory"] += nbytes / device.memory / 1e6
    if l2_bytes:
        times["l2"] += l2_bytes / (64 * device.cores * device.ghz * 1e3)
    return Prediction(dict(times), sum(t**OVERLAP for t in times.values()) ** (1 / OVERLAP))


def most_loaded(balls: int, bins: int) -> float:
    """Expected load of the fullest of `bins` after `balls` fall at random: the conflict of random accesses to banks."""
    counts: dict[tuple[int, ...], float] = {(0,) * bins: 1.0}
    for _ in range(balls):
        after: Counter[tuple[int, ...]] = Counter()
        for loads, probability in counts.items():
            for load, bins_with_it in Counter(loads).items():
                grown = list(loads)
                grown[grown.index(load)] += 1
                after[tuple(sorted(grown))] += probability * bins_with_it / bins
        counts = dict(after)
    return sum(max(loads) * probability for loads, probability in counts.items())
