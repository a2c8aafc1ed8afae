"""What `initperf inspect` shows of a ticket or a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from initperf.core.checks import check
from initperf.core.tables import NONE, Table, count_of, percent, size
from initperf.init.identify.identify import Description, describe_file
from initperf.init.schemes import Init, written
from initperf.report.page import flatten
from initperf.tickets.ticket import KEY, Ticket


def tables(path: Path, expect: Sequence[str] = ()) -> tuple[list[Table], int]:
    """Of a ticket, or of any other checkpoint; and how many of its parameters are not what `expect` ("glob=scheme") says."""
    check(path.is_file(), "a ticket or a checkpoint", f"{path}, which is not a file")
    wanted = dict(map(_parsed, expect))
    if _is_ticket(path):
        check(not wanted, "--expect for a checkpoint only: a ticket says itself what its weights are", path)
        return ticket_tables(path), 0
    found = describe_file(path, wanted)
    disagreements = [[f.name, str(f.disagreement)] for f in found.disagreements]
    shown = [checkpoint_table(path, found)]
    if disagreements:
        title = f"Not as expected: {count_of(len(disagreements), 'parameter')}"
        shown.append(Table(title, ["parameter", "disagreement"], disagreements, []))
    elif wanted:
        shown[0].notes.append("As expected: every parameter that --expect names.")
    return shown, len(disagreements)


def _parsed(text: str) -> tuple[str, str | Init]:
    """("*.weight", "kaiming_normal") of "*.weight=kaiming_normal"; an Init of "*.weight=normal(0, 0.02)"."""
    pattern, equals, scheme = (part.strip() for part in text.partition("="))
    check(bool(pattern and equals and scheme), "--expect to be GLOB=SCHEME", repr(text))
    return pattern, written(scheme) if "(" in scheme else scheme


def _is_ticket(path: Path) -> bool:
    """Has our metadata key; a damaged safetensors file counts as one, since Ticket.load says best what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == ".safetensors"


def checkpoint_table(path: Path, description: Description) -> Table:
    """How each parameter looks to have been initialized, and the evidence."""
    rows = []
    for found in description.findings:
        scheme = f"{found.scheme} (or {', '.join(found.others[:2])})" if found.others else found.scheme
        shape = " x ".join(map(str, found.shape))
        rows.append([found.name, shape, f"{found.mean:.3g}", f"{found.std:.4g}", scheme, found.evidence])
    return Table(f"Checkpoint {path.name}", ["parameter", "shape", "mean", "std", "scheme", "evidence"], rows, [])


def ticket_tables(path: Path) -> list[Table]:
    """Parameters with their survivors and initial distribution; the rest as settings. The hash is proven first."""
    ticket = Ticket.load(path)
    weights = ticket.weights()
    rows = []
    for name, (shape, dtype, init) in ticket.parameters.items():
        mask = ticket.masks.get(name)
        kept = (
            NONE if mask is None else f"{int(mask.sum()):,} of {mask.numel():,} ({percent(float(mask.float().mean()))})"
        )
        source = f"{init.function}({', '.join(f'{a:.6g}' for a in init.args)})" if init else "values in the file"
        rows.append([name, " x ".join(map(str, shape)), str(dtype).removeprefix("torch."), kept, source])
    for name, buffer in ticket.buffers.items():
        size_and_type = [" x ".join(map(str, buffer.shape)), str(buffer.dtype).removeprefix("torch.")]
        rows.append([name, *size_and_type, NONE, "buffer, stored in the file"])
    dense = sum(w.numel() * w.element_size() for w in weights.values())
    about = [
        ["density of the masked parameters", percent(ticket.density)],
        ["seed", NONE if ticket.seed is None else str(ticket.seed)],
        ["RNG contract version", str(ticket.rng_version)],
        ["SHA-256 of the initial weights", f"{ticket.sha256} (proven)"],
        ["file", f"{size(path.stat().st_size)}, 1/{dense / path.stat().st_size:.1f} of the dense {size(dense)}"],
        *([f"recipe.{key}", value] for key, value in flatten(ticket.recipe)),
    ]
    return [
        Table("Parameters", ["parameter", "shape", "dtype", "surviving", "initial values"], rows, []),
        Table(f"Ticket {path.name}", ["", ""], about, []),
    ]
