"""What users do every day, in a process that lacks some packages: python everyday.py [--only | --without] NAME...

--only: besides the standard library there is what is named; --without: what is named is not installed. Prints one JSON object:
SHA-256 of what was sampled and selected, warnings of the logger "initperf", optional packages that were loaded, backends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import sys
import tempfile
from pathlib import Path

OPTIONAL = ("rich", "typer", "matplotlib", "PIL", "scipy", "transformers", "lightning", "tensorboard", "pytest")


class _Partial:
    """A finder of modules that does not see all of them."""

    def __init__(self, finder, hidden):
        self._finder, self._hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if self._hidden(name.partition(".")[0]) else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


def hide(how: str, names: list[str]) -> None:
    if how == "--only":
        seen = {*names, "initperf", "kernels", *sys.stdlib_module_names}
        sys.meta_path[:] = [
            _Partial(f, lambda root: root not in seen and not root.startswith("_sysconfig")) for f in sys.meta_path
        ]
    elif how == "--without":
        sys.meta_path[:] = [_Partial(f, lambda root: root in names) for f in sys.meta_path]


def main(folder: Path) -> dict[str, object]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("initperf").addHandler(handler)

    import torch
    from torch import nn

    import initperf
    from initperf import init, ops

    digest = hashlib.sha256()

    def add(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for function, args in (
            ("uniform_", (-0.3, 0.7)),
            ("normal_", (0.1, 0.5)),
            ("trunc_normal_", (0.0, 1.0, -0.5, 2.0)),
            ("kaiming_uniform_", ()),
            ("xavier_normal_", ()),
            ("orthogonal_", ()),
            ("sparse_", (0.4,)),
        ):
            add(getattr(init, function)(torch.empty(12, 20, dtype=dtype), *args, seed=5))

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))

    x = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()

    def train(model: nn.Module, steps: int = 5) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = make()
    inits = initperf.initialize(model, "kaiming_normal", seed=3, stats=True)
    add(*model.parameters())
    with initperf.fast_init(seed=1):
        add(nn.Linear(5, 6).weight)
    masks = initperf.prune.magnitude({n: p.detach() for n, p in model.named_parameters() if "weight" in n}, 0.7)
    add(*masks.values())
    add(*initperf.prune.random({"a": torch.zeros(9, 9)}, 0.5, seed=2).values())
    losses = {}
    for sparse in (False, True):
        model = make()
        initperf.initialize(model, "kaiming_normal", seed=3)
        initperf.sparsify(model, masks, sparse=sparse)
        losses[sparse] = train(model)
        assert losses[sparse][-1] < losses[sparse][0]
        initperf.check_masks(model)
        with torch.no_grad():
            model(x)
        ticket = initperf.Ticket.from_model(model, inits=inits, weights=None)
    assert all(abs(a - b) < 1e-4 for a, b in zip(*losses.values(), strict=True))
    model = make()
    inits = initperf.initialize(model, "kaiming_normal", seed=3)
    ticket = initperf.Ticket.from_model(model, masks=masks, inits=inits)
    loaded = initperf.Ticket.load(ticket.save(folder / "ticket.safetensors"))
    loaded.apply(make())
    digest.update(loaded.sha256.encode())
    loaded.export(folder / "dense.safetensors")

    images = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    for kind in (initperf.MaskedConv2d, initperf.SparseConv2d):
        conv = kind(4, 5, 3, mask=torch.rand(5, 4, 3, 3, generator=torch.Generator().manual_seed(2)) < 0.4)
        conv(images).sum().backward()

    found = initperf.moments([*model.parameters(), images], order=4)
    assert bool(found.var.isfinite().all())
    with initperf.VarianceMonitor(model) as monitor:
        nn.functional.cross_entropy(model(x), y).backward()
        monitor.step()
    assert monitor.scalars()
    layer = nn.Linear(200, 200)
    initperf.initialize(layer, "kaiming_normal", seed=0)
    assert "kaiming_normal" in str(initperf.describe(layer))
    deep = nn.Sequential(*(nn.Linear(20, 20) for _ in range(9)))
    initperf.initialize(deep, "normal(0, 1)", seed=0)
    verdicts = initperf.check_init(deep, x)
    assert verdicts
    assert "variance" in str(verdicts)

    search = initperf.TicketSearch(make, out=folder / "search", rounds=1, fractions=0.5, trials=1, seed=0)
    for run in search:
        train(run.model, 2)
        run.log(2, val_loss=1.0, test_accuracy=0.5)
    assert (folder / "search/tickets/trial0-level1.safetensors").exists()
    loaded_now = sorted(name for name in OPTIONAL if name in sys.modules)

    problems = {}
    from initperf.report import page

    for name, call in (
        ("report", lambda: page.write_report(folder / "search")),
        ("figure", verdicts.figure),
        ("table", verdicts.table),
    ):
        try:
            call()
        except initperf.InitPerfError as error:
            problems[name] = str(error) if isinstance(error, ImportError) else f"no ImportError: {error}"
    from initperf.__main__ import main as command

    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        code = command(["--version"])
    backends = sorted({backend for _, backend in ops.CALLS})
    return {
        "sha256": digest.hexdigest(),
        "warnings": said,
        "loaded": loaded_now,
        "problems": problems,
        "command": [code, told.getvalue()],
        "backends": backends,
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        hide(sys.argv[1], sys.argv[2:])
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(main(Path(name))))
