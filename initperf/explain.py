"""describe: which known initialization explains each parameter of a model or a checkpoint, with the evidence."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from initperf import rng, schemes
from initperf.candidates import MATRIX, SAMPLED, Candidate, Facts, candidates, rejected
from initperf.checks import FLOATS, InitPerfTypeError, check, fail
from initperf.init_plan import plan
from initperf.schemes import Init, Place
from initperf.stats import Moments, moments

TRAINED = "trained, unknown"
FEW = 1000  # values below which several schemes usually fit
ANY_SCALE = 10_000  # values from which a normal or uniform of a scale that no scheme has is named so
_TOO_FEW = 20


@dataclass
class Finding:
    """One parameter: what was measured, the scheme that explains it best, others that fit too, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float
    zeros: float
    scheme: str
    others: list[str] = field(default_factory=list)
    evidence: str = ""
    disagreement: str | None = None


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
    rows and columns and the largest singular value do (initperf/candidates.py: the tests and their fixed limits). Of
    several that fit, the one that explains most of the model is named. What nothing explains is "trained, unknown".
    expect: {glob: name of a scheme, or an Init}; the last glob that matches counts, and disagreements are reported.
    Parameters that are not float32, bfloat16, float16 or float64, or have no values, are left out.
    """
    if isinstance(model, nn.Module):
        tensors = {rng.canonical_name(n): p.detach() for n, p in model.named_parameters()}
    elif isinstance(model, Mapping) and all(isinstance(t, Tensor) for t in model.values()):
        tensors = {n: t.detach() for n, t in model.items()}
    else:
        fail("a torch.nn.Module or a mapping of names to tensors", type(model).__name__, kind=InitPerfTypeError)
    for pattern in expect or {}:
        check(any(fnmatchcase(n, pattern) for n in tensors), f"expect to match one of {', '.join(tensors)}", pattern)
    for name, tensor in tensors.items():
        check(not tensor.is_meta, f"values in {name}", "a tensor on the meta device")
    kept = {n: t for n, t in tensors.items() if t.dtype in FLOATS and t.numel()}
    wanted = _expected(model, kept, expect or {})

    depth = _depth(kept)
    own = _own(model)
    results = [_explain(n, t, _hypotheses(n, t, kept, depth, own)) for n, t in kept.items()]
    _choose(results)
    for finding, _ in results:
        if finding.name in wanted:
            finding.disagreement = _compare(finding, kept[finding.name], wanted[finding.name])
    return Description([finding for finding, _ in results])


def describe_file(path: str | Path, expect: Mapping[str, str | Init] | None = None) -> Description:
    """describe of a checkpoint: safetensors, or torch.save's file read with weights_only=True. Raises if it is neither."""
    path = Path(path)
    check(path.is_file(), "a checkpoint", f"{path}, which is not a file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: Any = load_file(path)
    except (SafetensorError, OSError) as not_safetensors:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as not_torch:
            fail(f"a safetensors file or a torch checkpoint of tensors in {path}", f"{not_safetensors}; {not_torch}")
    found = dict(_tensors(tensors))
    check(bool(found), f"tensors in {path}", f"{type(tensors).__name__} without any")
    return describe(found, expect)


def _tensors(value: Any, name: str = "") -> Iterable[tuple[str, Tensor]]:
    """The float tensors of nested mappings; where there is a `state_dict` or `model` among other things, only that."""
    if isinstance(value, Tensor):
        if value.dtype in FLOATS:
            yield name, value
        return
    if isinstance(value, Mapping):
        inner = next(
            (key for key in ("state_dict", "model", "model_state_dict") if isinstance(value.get(key), Mapping)), None
        )
        if inner is not None:
            yield from _tensors(value[inner], name)
            return
        for key, part in value.items():
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """Layers of the model: the largest number in any name, plus one."""
    return 1 + max((int(k) for name in tensors for k in re.findall(r"(?<![^.])\d+(?![^.])", name)), default=0)


def _own(model: Any) -> dict[str, Init]:
    """Each parameter's own distribution, by its module's class."""
    found: dict[str, Init] = {}
    if isinstance(model, nn.Module):
        for path, module in reversed(list(model.named_modules())):
            prefix = f"{path}." if path else ""
            found |= {rng.canonical_name(prefix + below): init for below, init in schemes.own(module).items()}
    return found


def _hypotheses(
    name: str, tensor: Tensor, tensors: Mapping[str, Tensor], depth: int, own: Mapping[str, Init]
) -> list[Candidate]:
    sibling = tensors.get(re.sub("bias", "weight", name)) if tensor.dim() == 1 else None
    fan = math.prod(sibling.shape[1:]) if sibling is not None and sibling.dim() >= 2 else None
    found = list(candidates(tensor.shape, fan, depth))
    by_itself = own.get(name)
    if by_itself is not None and all(_differs(by_itself, c.init) for c in found):
        found.append(Candidate(f"torch default ({by_itself})", by_itself))
    return found


def _differs(a: Init, b: Init) -> bool:
    return a.function != b.function or not all(
        math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a.args, b.args, strict=True)
    )


def _explain(name: str, tensor: Tensor, hypotheses: list[Candidate]) -> tuple[Finding, list[str]]:
    """The finding with its first explanation, and all schemes that fit."""
    found = moments(tensor)
    finding = _measured(name, tensor, found)
    if int(found.nonfinite):
        finding.scheme, finding.evidence = TRAINED, f"{int(found.nonfinite)} values are not finite"
        return finding, []
    special = _special(tensor, found)
    if special:
        finding.scheme, finding.evidence = special
        return finding, [finding.scheme]
    dense, note = _without_zeros(tensor, float(found.zeros))
    facts = _facts(dense, found if dense is tensor else moments(dense), tensor.dtype)
    if facts.n < _TOO_FEW:
        finding.scheme, finding.evidence = "unknown", f"{facts.n} values are too few to tell"
        return finding, []
    fitting = [c for c in hypotheses if rejected(c.init, facts) is None]
    if fitting:
        finding.evidence = f"{_text(facts)}{note}"
        return finding, list(dict.fromkeys(c.scheme for c in fitting))
    finding.scheme, finding.evidence = _of_any_scale(facts, hypotheses)
    finding.evidence += note
    return finding, []


def _measured(name: str, tensor: Tensor, found: Moments) -> Finding:
    mean, std, low, high = (float(x) for x in (found.mean, found.std, found.min, found.max))
    kurtosis, zeros = float(found.kurtosis), float(found.zeros)
    return Finding(name, tuple(tensor.shape), tensor.dtype, mean, std, low, high, kurtosis, zeros, TRAINED)


def _special(tensor: Tensor, found: Moments) -> tuple[str, str] | None:
    """Constants, identities and orthogonal matrices: what is no distribution of independent values."""
    low, high = float(found.min), float(found.max)
    if low == high:
        names = {0.0: "zeros", 1.0: "ones"}
        return names.get(low, f"constant({low:g})"), f"all {tensor.numel()} values are {low:g}"
    if tensor.dim() < 2:
        return None
    matrix = tensor.reshape(tensor.shape[0], -1)
    if low == 0 and high == 1 and int(found.count * (1 - found.zeros) + 0.5) <= max(matrix.shape):
        if tensor.dim() == 2 and torch.equal(tensor, torch.eye(*tensor.shape, dtype=tensor.dtype)):
            return "eye", "the identity"
        if tensor.dim() in (3, 4, 5) and torch.equal(tensor, nn.init.dirac_(torch.empty(tensor.shape)).to(tensor)):
            return "dirac", "the identity of a convolution"
    gain = _orthogonal_gain(matrix)
    if gain is not None:
        scaled = "" if abs(gain - 1) < 1e-3 else f" (gain {gain:.4g})"
        return f"orthogonal{scaled}", "its rows or columns are orthogonal, and of one length"
    return None


def _orthogonal_gain(matrix: Tensor) -> float | None:
    """g if matrix matrix' (or matrix' matrix) is g^2 times the identity within rounding. Tried on 64 rows first.

    Rounding n entries of size g / sqrt(n) by eps / 2 each moves a product of two rows by about 0.4 eps g^2 / sqrt(n), of
    which 20 times is allowed; between independent values the product is about g^2 / sqrt(n), 1 / (8 eps) times more. The QR adds some float32 eps.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    k = wide.shape[0]
    if k < 2 or wide.shape[1] < 4:
        return None
    allowed = 8 * torch.finfo(matrix.dtype).eps / math.sqrt(wide.shape[1]) + 64 * torch.finfo(torch.float32).eps
    for rows in (wide[:64], wide):
        if rows.numel() > MATRIX:
            break
        x = rows.double()
        gram = x @ x.t()
        square = float(gram.diagonal().mean())
        off = gram - square * torch.eye(len(gram), dtype=torch.float64)
        if not square > 0 or float(off.abs().max()) / square > allowed:
            return None
    return math.sqrt(square)


def _without_zeros(tensor: Tensor, zeros: float) -> tuple[Tensor, str]:
    """The tensor without rows of zeros (a padding row), or, where zeros lie scattered (a mask), its other values."""
    if zeros == 0:
        return tensor, ""
    if tensor.dim() >= 2:
        alive = tensor.reshape(tensor.shape[0], -1).ne(0).any(1)
        if not alive.all():
            rest = tensor[alive]
            if float((rest == 0).double().mean()) < 1e-3:
                return rest, f"; {int((~alive).sum())} rows are zero"
    if zeros > 1e-3:
        return tensor[tensor != 0], f"; {zeros:.1%} are zero (pruned?)"
    return tensor, ""


def _facts(tensor: Tensor, found: Moments, dtype: torch.dtype) -> Facts:
    flat = tensor.reshape(-1)
    step = max(1, len(flat) // SAMPLED)
    some = flat[::step][:SAMPLED].double()
    eps = torch.finfo(dtype).eps
    cell = torch.exp2(torch.floor(torch.log2(some.abs().clamp(min=torch.finfo(dtype).tiny)))) * eps
    spread = (torch.arange(len(some), dtype=torch.float64) * 0.6180339887498949) % 1 - 0.5
    matrix = None
    if tensor.dim() >= 2:
        seen = tensor.reshape(tensor.shape[0], -1)
        seen = seen[: max(8, MATRIX // seen.shape[1])].float()
        matrix = seen if min(seen.shape) >= 8 else None
    mean, variance, low, high = (float(x) for x in (found.mean, found.var, found.min, found.max))
    return Facts(len(flat), mean, variance, low, high, (some + cell * spread).sort().values, eps, matrix)


def _text(facts: Facts) -> str:
    return f"{facts.n} values, std {math.sqrt(facts.variance):.4g}, range [{facts.low:.3g}, {facts.high:.3g}]"


def _of_any_scale(facts: Facts, hypotheses: list[Candidate]) -> tuple[str, str]:
    """A normal or uniform distribution that no known scheme has, if there are values enough to say so; else trained."""
    std = math.sqrt(facts.variance)
    reach = max(abs(facts.low), abs(facts.high))
    reasons = []
    for init, text in (
        (Init("normal", (0.0, std)), f"normal({std:.4g}), of no known scheme"),
        (Init("uniform", (-reach, reach)), f"uniform({reach:.4g}), of no known scheme"),
        (
            Init("trunc_normal", (0.0, std / 0.8796, -2 * std / 0.8796, 2 * std / 0.8796)),
            f"trunc_normal({std / 0.8796:.4g}, cut at 2 std), of no known scheme",
        ),
    ):
        reason = rejected(init, facts)
        if reason is None and facts.n >= ANY_SCALE:
            return text, _text(facts)
        reasons.append(reason)
    if reasons[0] is None or reasons[1] is None:
        return "unknown", f"{_text(facts)}: too few to tell a scale of no known scheme from training"
    return TRAINED, f"no scheme fits; as a normal: {reasons[0]}"


def _choose(results: list[tuple[Finding, list[str]]]) -> None:
    """Of several schemes that fit a tensor, the one that fits most tensors of the model; then the likelier."""
    votes = Counter(s for finding, fitting in results for s in fitting if math.prod(finding.shape) >= FEW)
    for finding, fitting in results:
        if fitting:
            best = max(fitting, key=lambda s: (votes[s], -fitting.index(s)))
            finding.scheme, finding.others = best, [s for s in fitting if s != best]


def _expected(model: Any, tensors: Mapping[str, Tensor], expect: Mapping[str, str | Init]) -> dict[str, Init]:
    """The distribution that `expect` means for each tensor that it names."""
    if isinstance(model, nn.Module):
        tasks = plan(model, "keep", expect)
        return {t.name: t.init for t in tasks if t.init is not None}
    wanted = {}
    for name, tensor in tensors.items():
        chosen = [e for pattern, e in expect.items() if fnmatchcase(name, pattern)]
        if not chosen:
            continue
        if isinstance(chosen[-1], Init):
            wanted[name] = chosen[-1].check(name)
            continue
        check(chosen[-1] in schemes.NAMES, f"expect to be one of {', '.join(schemes.NAMES)} or an Init", chosen[-1])
        path, _, leaf = name.rpartition(".")
        place = Place(name, tensor, nn.Module(), path, leaf, frozenset())
        init = schemes.named(chosen[-1], place, None)
        if init is None and tensor.dim() == 1:
            init = schemes.constant(1)
        if init is not None:
            wanted[name] = init
    return wanted


def _compare(finding: Finding, tensor: Tensor, init: Init) -> str | None:
    """Why the tensor is not `init`, in words; None if it can be."""
    if init.function == "constant":
        same = finding.low == finding.high == float(torch.tensor(init.args[0], dtype=tensor.dtype))
        return None if same else f"expected {init}. Found {finding.scheme}, std {finding.std:.4g}"
    if init.function == "orthogonal":
        return None if finding.scheme.startswith("orthogonal") else f"expected {init}. Found {finding.scheme}"
    if finding.low == finding.high:
        return (
            None if finding.std == init.moments(finding.shape)[1] == 0 else f"expected {init}. Found {finding.scheme}"
        )
    dense, _ = _without_zeros(tensor, finding.zeros)
    reason = rejected(init, _facts(dense, moments(dense), tensor.dtype))
    return f"expected {init}: {reason}. Found {finding.scheme}" if reason else None
