"""Source-tree stand-in for the device code, which lives in kernels/ at the top of the repository; wheels install that folder here."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
