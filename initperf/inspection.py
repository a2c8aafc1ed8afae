"""What `initperf inspect` shows of a ticket or a checkpoint."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from initperf.checks import check
from initperf.findings import NONE, Table, percent, size
from initperf.report import flatten
from initperf.ticket import KEY, Ticket


def tables(path: Path) -> list[Table]:
    """Of a ticket, or of any other checkpoint."""
    check(path.is_file(), "a ticket or a checkpoint", f"{path}, which is not a file")
    return ticket_tables(path) if _is_ticket(path) else [checkpoint_table(path)]


def _is_ticket(path: Path) -> bool:
    """Has our metadata key; a damaged safetensors file counts as one, since Ticket.load says best what is wrong with it."""
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return path.suffix == ".safetensors"


def checkpoint_table(path: Path) -> Table:
    """How each parameter looks to have been initialized, and the evidence."""
    from initperf.init import describe_file

    rows = []
    for found in describe_file(path).findings:
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
