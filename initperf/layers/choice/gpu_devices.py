"""What the makers' data sheets say of GPUs: the figures behind every prediction, none of them measured here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Device:
    """One GPU. Rates are dense peaks: bytes in TB/s, arithmetic in TFLOP/s (a multiply-add is two), by "float32", "tf32", "16bit"."""

    name: str
    target: str
    cores: int  # streaming multiprocessors, compute units
    ghz: float  # the boost clock that the peaks are given at
    memory: float
    peaks: dict[str, float] = field(repr=False, hash=False)
    shared_kib: int = 0  # shared memory of a core; a program gets `program_kib` of it
    program_kib: int = 0
    warps: int = 64  # resident on a core
    programs: int = 32  # resident on a core
    launch_us: float = (
        3.0  # between a launch and the kernel's first result; a rule of thumb, the only figure of no data sheet
    )
    source: str = ""

    @property
    def amd(self) -> bool:
        return self.target.startswith("gfx")

    @property
    def warp(self) -> int:
        return 64 if self.amd else 32


DEVICES = {
    d.name: d
    for d in (
        Device(
            "a100", "sm_80", 108, 1.41, 2.039, {"float32": 19.5, "tf32": 156, "16bit": 312}, 164, 163, 64, 32,
            source="NVIDIA A100 data sheet (SXM, 80 GB); CUDA programming guide, compute capability 8.0",
        ),
        Device(
            "rtx3090", "sm_86", 82, 1.695, 0.936, {"float32": 35.6, "tf32": 35.6, "16bit": 71}, 100, 99, 48, 16,
            source="NVIDIA GA102 white paper; CUDA programming guide, 8.6",
        ),
        Device(
            "rtx4090", "sm_89", 128, 2.52, 1.008, {"float32": 82.6, "tf32": 82.6, "16bit": 165.2}, 100, 99, 48, 24,
            source="NVIDIA Ada white paper; CUDA programming guide, 8.9",
        ),
        Device(
            "h100", "sm_90", 132, 1.98, 3.35, {"float32": 67, "tf32": 494.7, "16bit": 989.4}, 228, 227, 64, 32,
            source="NVIDIA H100 data sheet (SXM); CUDA programming guide, 9.0",
        ),
        Device(
            "h200", "sm_90", 132, 1.98, 4.8, {"float32": 67, "tf32": 494.7, "16bit": 989.4}, 228, 227, 64, 32,
            source="NVIDIA H200 data sheet (SXM); CUDA programming guide, 9.0",
        ),
        Device(
            "b200", "sm_100", 148, 1.965, 8.0, {"float32": 75, "tf32": 1125, "16bit": 2250}, 228, 227, 64, 32,
            source="NVIDIA HGX B200 data sheet, one of eight; CUDA programming guide, 10.0",
        ),
        Device(
            "rtx5090", "sm_120", 170, 2.41, 1.792, {"float32": 104.8, "tf32": 104.8, "16bit": 209.5}, 100, 99, 48, 24,
            source="NVIDIA RTX Blackwell white paper; CUDA programming guide, 12.0",
        ),
        Device(
            "mi300x", "gfx942", 304, 2.1, 5.3, {"float32": 163.4, "tf32": 653.7, "16bit": 1307.4}, 64, 64, 32, 32,
            source="AMD Instinct MI300X data sheet; CDNA 3 white paper",
        ),
        Device(
            "mi355x", "gfx950", 256, 2.4, 8.0, {"float32": 157.3, "tf32": 157.3, "16bit": 2516}, 160, 160, 32, 32,
            source="AMD Instinct MI355X data sheet; CDNA 4 white paper",
        ),
    )
}  # fmt: skip

# The device that stands for each compilation target in the tables.
BY_TARGET = {
    d.target: d
    for d in (DEVICES[n] for n in ("a100", "rtx3090", "rtx4090", "h100", "b200", "rtx5090", "mi300x", "mi355x"))
}


def device_of(name: str, target: str) -> Device | None:
    """The listed GPU that a card's own name contains ("NVIDIA H200" is h200), else the one that stands for its target, else None."""
    plain = name.lower().replace(" ", "")
    return next((d for d in DEVICES.values() if d.name in plain), BY_TARGET.get(target.split(":")[0]))
