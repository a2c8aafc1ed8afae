"""describe: which known initialization explains each parameter of a model or a checkpoint, with the evidence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from initperf import rng
from initperf.core.checks import FLOATS, InitPerfTypeError, check, check_mapping, fail
from initperf.init import schemes
from initperf.init.identify.candidates import Candidate, Surroundings, candidates
from initperf.init.identify.checkpoint import read_tensors
from initperf.init.identify.choose_scheme import NUMBER, TRAINED, Case, Fit, most_probable
from initperf.init.identify.expectation import disagreement, expected
from initperf.init.identify.finding import Finding
from initperf.init.identify.fit import Facts, facts_of, log_likelihood, rejected, without_clamped, without_zeros
from initperf.init.identify.structured import structured
from initperf.init.schemes import Init
from initperf.variance.moments import Moments, moments

ANY_SCALE = 10_000  # values from which a normal or uniform of a scale that no scheme has is named so
NO_SCHEME = ", of no known scheme"
_TOO_FEW = 20
_LARGE = 1000


@dataclass
class Description:
    """What describe found, one Finding a parameter; str() is a table."""

    findings: list[Finding]

    @property
    def disagreements(self) -> list[Finding]:
        """Parameters that are not what `expect` says."""
        return [f for f in self.findings if f.disagreement]

    def __str__(self) -> str:
        rows = [("parameter", "shape", "mean", "std", "scheme", "evidence")]
        for f in self.findings:
            also = f" (or {', '.join(f.others[:2])})" if f.others else ""
            shape = " x ".join(map(str, f.shape)) or "()"
            rows.append((f.name, shape, f"{f.mean:.3g}", f"{f.std:.4g}", f.scheme + also, f.evidence))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"DISAGREES: {f.name}: {f.disagreement}" for f in self.disagreements]
        return "\n".join(lines)


def describe(model: nn.Module | Mapping[str, Tensor], expect: Mapping[str, str | Init] | None = None) -> Description:
    """Which known scheme (He, Xavier, LeCun, torch's defaults, normal and truncated 0.02, constants, orthogonal, ...) explains each parameter.

    A scheme fits if mean, variance, range, tails, the shape (Kolmogorov-Smirnov) and, for matrices, the independence of
    rows and columns and the largest singular value do (initperf/init/identify/fit.py: the tests and their fixed limits). Of several that
    fit, the one of the greatest posterior probability is named: its likelihood times how much of this model it explains.
    What nothing explains is "trained, unknown".
    expect: {glob: name of a scheme, or an Init}; the last glob that matches counts, and disagreements are reported.
    In a mapping, which has no modules, a scheme takes matrices named weight for those of linear layers.
    Parameters that are not float32, bfloat16, float16 or float64, or have no values, are left out.
    """
    if isinstance(model, nn.Module):
        tensors = {rng.canonical_name(n): p.detach() for n, p in model.named_parameters()}
    elif isinstance(model, Mapping) and all(isinstance(t, Tensor) for t in model.values()):
        tensors = {n: t.detach() for n, t in model.items()}
    else:
        fail("a torch.nn.Module or a mapping of names to tensors", type(model).__name__, kind=InitPerfTypeError)
    check_mapping(expect, "expect", "{glob of names: scheme}")
    for pattern in expect or {}:
        known = ", ".join(list(tensors)[:8]) + (", ..." if len(tensors) > 8 else "")
        check(any(fnmatchcase(n, pattern) for n in tensors), f"expect to match one of {known}", pattern)
    for name, tensor in tensors.items():
        check(not tensor.is_meta, f"values in {name}", "a tensor on the meta device")
    kept = {n: t for n, t in tensors.items() if t.dtype in FLOATS and t.numel()}
    wanted = expected(model, kept, expect or {})

    around = _surroundings(kept)
    own = _own(model)
    with torch.device("cpu"):  # one tensor at a time, for statistics that no GPU is needed for
        results = [_explain(n, t.cpu(), _hypotheses(n, t, kept, around, own.get(n))) for n, t in kept.items()]
        _choose(results)
        for finding, _ in results:
            if finding.name in wanted:
                finding.disagreement = disagreement(finding, kept[finding.name].cpu(), wanted[finding.name])
    return Description([finding for finding, _ in results])


def describe_file(path: str | Path, expect: Mapping[str, str | Init] | None = None) -> Description:
    """describe of a checkpoint: safetensors (or the index.json of its shards), or torch.save's file, read with weights_only=True."""
    return describe(read_tensors(Path(path)), expect)


def _surroundings(tensors: Mapping[str, Tensor]) -> Surroundings:
    """Depths: how many layers each numbered list in the names has. Width: the commonest size among the matrices."""
    lists: dict[str, int] = {}
    for name in tensors:
        for match in NUMBER.finditer(name):
            stem = NUMBER.sub("*", name[: match.start()])
            lists[stem] = max(lists.get(stem, 0), int(match[0]) + 1)
    depths = [depth for depth, _ in Counter(lists.values()).most_common(4)]
    sizes = Counter(size for t in tensors.values() if t.dim() == 2 for size in t.shape)
    return Surroundings(tuple(sorted(depths)), max(sizes, key=lambda s: sizes[s]) if sizes else 0)


def _own(model: Any) -> dict[str, Init]:
    """Each parameter's own distribution, by its module's class."""
    found: dict[str, Init] = {}
    if isinstance(model, nn.Module):
        for path, module in reversed(list(model.named_modules())):
            prefix = f"{path}." if path else ""
            found |= {rng.canonical_name(prefix + below): init for below, init in schemes.own(module).items()}
    return found


def _hypotheses(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], around: Surroundings, by_itself: Init | None
) -> list[Candidate]:
    """All candidates; those that are what the module's class does by itself come first."""
    sibling = tensors.get(re.sub("bias", "weight", name)) if tensor.dim() == 1 else None
    fan = math.prod(sibling.shape[1:]) if sibling is not None and sibling.dim() >= 2 else None
    found = list(candidates(name, tensor.shape, fan, around))
    if by_itself is None:
        return found
    if all(_differs(by_itself, c.init) for c in found):
        return [Candidate(f"torch default ({by_itself})", by_itself), *found]
    return sorted(found, key=lambda c: _differs(by_itself, c.init))


def _differs(a: Init, b: Init) -> bool:
    return a.function != b.function or not all(
        math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a.args, b.args, strict=True)
    )


def _explain(name: str, tensor: Tensor, hypotheses: list[Candidate]) -> tuple[Finding, Case | None]:
    """The finding, and all schemes that fit, if any do."""
    found = moments(tensor)
    finding = _measured(name, tensor, found)
    if int(found.nonfinite):
        finding.scheme, finding.evidence = TRAINED, f"{int(found.nonfinite)} values are not finite"
        return finding, None
    special = structured(tensor, found)
    if special:
        finding.scheme, finding.evidence = special
        return finding, None
    dense, note = without_zeros(tensor, float(found.zeros))
    dense, clamped = without_clamped(dense, found)
    note += clamped
    facts = facts_of(dense, found if dense is tensor else moments(dense), tensor.dtype)
    if facts.n < _TOO_FEW:
        finding.scheme, finding.evidence = "unknown", f"{facts.n} values are too few to tell"
        return finding, None
    fitting = [Fit(c, log_likelihood(c.init, facts)) for c in hypotheses if rejected(c.init, facts) is None]
    if fitting:
        finding.evidence = f"{_text(facts)}{note}"
        free = log_likelihood(Init("normal", (facts.mean, math.sqrt(facts.variance))), facts) - math.log(facts.n)
        return finding, Case(name, finding.shape, fitting, free)
    finding.scheme, finding.evidence, finding.init = _of_any_scale(facts)
    finding.evidence += note
    return finding, None


def _measured(name: str, tensor: Tensor, found: Moments) -> Finding:
    mean, std, low, high = (float(x) for x in (found.mean, found.std, found.min, found.max))
    kurtosis, zeros = float(found.kurtosis), float(found.zeros)
    return Finding(name, tuple(tensor.shape), tensor.dtype, mean, std, low, high, kurtosis, zeros, TRAINED)


def _text(facts: Facts) -> str:
    return f"{facts.n} values, std {math.sqrt(facts.variance):.4g}, range [{facts.low:.3g}, {facts.high:.3g}]"


def _of_any_scale(facts: Facts) -> tuple[str, str, Init | None]:
    """A normal or uniform distribution that no known scheme has, if there are values enough to say so; else trained."""
    std = math.sqrt(facts.variance)
    reach = max(abs(facts.low), abs(facts.high))
    reasons = []
    for init, text in (
        (Init("normal", (0.0, std)), f"normal({std:.4g}){NO_SCHEME}"),
        (Init("uniform", (-reach, reach)), f"uniform({reach:.4g}){NO_SCHEME}"),
        (
            Init("trunc_normal", (0.0, std / 0.8796, -2 * std / 0.8796, 2 * std / 0.8796)),
            f"trunc_normal({std / 0.8796:.4g}, cut at 2 std){NO_SCHEME}",
        ),
    ):
        reason = rejected(init, facts)
        if reason is None and facts.n >= ANY_SCALE:
            return text, _text(facts), init
        reasons.append(reason)
    if reasons[0] is None or reasons[1] is None:
        return "unknown", f"{_text(facts)}: too few to tell a scale of no known scheme from training", None
    return TRAINED, f"no scheme fits; as a normal: {reasons[0]}", None


def _choose(results: list[tuple[Finding, Case | None]]) -> None:
    """Name each tensor's most probable scheme, and call trained what only the rest of the model shows to be."""
    large = [(finding, case) for finding, case in results if math.prod(finding.shape) >= _LARGE]
    trained = sum(case is None and finding.scheme == TRAINED for finding, case in large)
    cases = [(finding, case) for finding, case in results if case is not None]
    for (finding, case), ranked in zip(cases, most_probable([case for _, case in cases], trained), strict=True):
        finding.scheme, *finding.others = ranked
        if finding.scheme == TRAINED:
            finding.evidence += "; near a scheme, but not as near as what is not trained comes, and other tensors are"
        finding.init = next((fit.candidate.init for fit in case.fits if fit.candidate.scheme == ranked[0]), None)
    if 2 * trained >= max(1, len(large)):
        for finding, _ in large:
            if finding.scheme == "unknown" or finding.scheme.endswith(NO_SCHEME):
                finding.evidence += f"; looks like {finding.scheme}, but most of the model is trained"
                finding.scheme, finding.init = TRAINED, None
