"""Plain-torch definition of every op: the specification, the test oracle, and the fallback where no compiler is installed."""

from __future__ import annotations
