"""Which distribution a parameter gets: what each torch.nn class means by itself, and the named schemes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, dtype, empty, nn
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from initperf import rng
from initperf.core.checks import InitPerfTypeError, fail
from initperf.core.torch_private import ConvNd, NormBase, fans
from initperf.core.units import _is_transformers_conv1d

_ARGUMENTS = {"constant": 1, "uniform": 2, "normal": 2, "trunc_normal": 4, "orthogonal": 1}


class Init(NamedTuple):
    """constant (value), uniform (lo, hi), normal (mean, std), trunc_normal (mean, std, a, b) or orthogonal (gain)."""

    function: str
    args: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(f'{a:.6g}' for a in self.args)})"

    def check(self, name: str) -> Init:
        """self, if function and arguments are known and possible."""
        if self.function not in _ARGUMENTS or len(self.args) != _ARGUMENTS[self.function]:
            known = ", ".join(f"{f} with {n}" for f, n in _ARGUMENTS.items())
            fail(f"an Init of {known} arguments for {name}", f"{self.function} with {len(self.args)}")
        if not all(isinstance(a, (int, float)) for a in self.args):
            fail(f"numbers as arguments for {name}", self.args, kind=InitPerfTypeError)
        return self

    def distribution(self, of: dtype) -> rng.Distribution:
        """For the sampling op; a constant is a uniform distribution of no width. Raises if the arguments are impossible."""
        if self.function == "constant":
            return rng.uniform(self.args[0], self.args[0], of)
        if self.function == "uniform":
            return rng.uniform(self.args[0], self.args[1], of)
        if self.function == "trunc_normal":
            mean, std, a, b = self.args
            return rng.trunc_normal(mean, std, a, b, of)
        return rng.normal(*(self.args if self.function == "normal" else (0.0, 1.0)))

    def scaled(self, factor: float) -> Init:
        """The distribution of factor * value."""
        return Init(self.function, tuple(a * factor for a in self.args))

    def moments(self, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and variance of a value of a tensor of this shape."""
        args = self.args
        if self.function == "constant":
            return args[0], 0.0
        if self.function == "uniform":
            return (args[0] + args[1]) / 2, (args[1] - args[0]) ** 2 / 12
        if self.function == "normal":
            return args[0], args[1] ** 2
        if self.function == "orthogonal":
            rows, columns = shape[0], math.prod(shape[1:])
            return 0.0, args[0] ** 2 / max(rows, columns)
        return _truncated_moments(*args)


def _truncated_moments(mean: float, std: float, a: float, b: float) -> tuple[float, float]:
    alpha, beta = (a - mean) / std, (b - mean) / std

    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    mass = below(beta) - below(alpha)
    if mass <= 1e-6:
        return math.nan, math.nan
    first = (density(alpha) - density(beta)) / mass
    edge = sum(s * x * density(x) for s, x in ((1, alpha), (-1, beta)) if math.isfinite(x)) / mass
    return mean + std * first, std * std * (1 + edge - first * first)


def constant(value: float) -> Init:
    return Init("constant", (float(value),))


def uniform(bound: float) -> Init:
    return Init("uniform", (-bound, bound))


def normal(std: float) -> Init:
    return Init("normal", (0.0, std))


def trunc_normal(std: float) -> Init:
    """Cut at -2 and 2, as timm and torch do: absolute values."""
    return Init("trunc_normal", (0.0, std, -2.0, 2.0))


class Place(NamedTuple):
    """A parameter and where it stands: `leaf` is its name in `module`, `path` the module's name in the model.

    residual: paths of all the model's projections into a residual stream.
    """

    name: str
    parameter: Tensor
    module: nn.Module
    path: str
    leaf: str
    residual: frozenset[str]


def _he(tensor: Tensor, gain: float, fan_out: bool = False) -> float:
    return gain / math.sqrt(max(1, fans(tensor)[fan_out]))


def _glorot(tensor: Tensor) -> float:
    return math.sqrt(2.0 / max(1, sum(fans(tensor))))


def fully_connected(weight: Tensor) -> dict[str, Init]:
    """kaiming_uniform_(a=sqrt(5)), and the bias within 1 / sqrt(fan_in): torch's Linear and convolutions."""
    gain = math.sqrt(2.0 / (1 + math.sqrt(5) ** 2))
    fan = fans(weight)[0]
    return {
        "weight": uniform(math.sqrt(3.0) * _he(weight, gain)),
        "bias": uniform(1 / math.sqrt(fan) if fan > 0 else 0.0),
    }


def _dense_weight(module: Any) -> Tensor:
    """`weight`, whose shape tells the fans, also where torch.nn.utils.prune keeps it as weight_orig, or a sparse layer compressed."""
    if _is_compressed(module):
        return empty(module.weight_shape, device="meta")
    return module._parameters.get("weight_orig", module.weight)


def _attention(m: nn.MultiheadAttention) -> dict[str, Init]:
    own = {
        name: uniform(math.sqrt(3.0) * _glorot(p))
        for name, p in m.named_parameters(recurse=False)
        if name.endswith("proj_weight")
    }
    own |= {name: normal(_glorot(p)) for name in ("bias_k", "bias_v") if (p := getattr(m, name)) is not None}
    if m.in_proj_bias is not None:
        own |= {"in_proj_bias": constant(0), "out_proj.bias": constant(0)}
    return own


def _everywhere(m: Any, init: Init) -> dict[str, Init]:
    return dict.fromkeys((name for name, _ in m.named_parameters()), init)


def _recurrent(m: Any) -> dict[str, Init]:
    return _everywhere(m, uniform(1.0 / math.sqrt(m.hidden_size) if m.hidden_size > 0 else 0.0))


def _norm(m: Any) -> dict[str, Init]:
    return {"weight": constant(1), "bias": constant(0)}


def _embedding(m: Any) -> dict[str, Init]:
    return {"weight": normal(1.0)}


def _bilinear(m: Any) -> dict[str, Init]:
    return _everywhere(m, uniform(1 / math.sqrt(max(1, m.weight.size(1)))))


def _transformer(m: nn.Transformer) -> dict[str, Init]:
    return {n: uniform(math.sqrt(3.0) * _glorot(p)) for n, p in m.named_parameters() if p.dim() > 1}


NORMS: tuple[type[nn.Module], ...] = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)
# class -> {name below the module: distribution}; a parent's word counts more than its child's
_OWN: list[tuple[tuple[type[nn.Module], ...], Callable[[Any], dict[str, Init]]]] = [
    ((nn.Linear, ConvNd), lambda m: fully_connected(_dense_weight(m))),
    (NORMS, _norm),
    (EMBEDDINGS, _embedding),
    ((RNNBase, RNNCellBase), _recurrent),
    ((nn.MultiheadAttention,), _attention),
    ((nn.Transformer,), _transformer),
    ((nn.Bilinear,), _bilinear),
    ((nn.PReLU,), lambda m: {"weight": constant(m.init)}),
]
_RESETS = ("reset_parameters", "_reset_parameters")


def _is_compressed(module: nn.Module) -> bool:
    """A sparse linear or convolutional layer: survivors in weight_values, their places in weight_mask_bits."""
    return "weight_mask_bits" in module._buffers and hasattr(module, "weight_shape")


def own(module: nn.Module) -> dict[str, Init]:
    """What the module's class means by itself, by name below the module; {} for a class that is not torch.nn's."""
    if _is_compressed(module):
        return fully_connected(_dense_weight(module))
    for classes, table in _OWN:
        if isinstance(module, classes):
            return table(module)
    if _is_transformers_conv1d(module):
        return {"weight": normal(0.02), "bias": constant(0)}
    return {}


def custom_reset(module: nn.Module) -> str | None:
    """The name of the module's own reset function, if its class wrote one that is not torch.nn's (or this package's)."""
    for name in _RESETS:
        function = getattr(type(module), name, None)
        if function is not None:
            return None if function.__module__.startswith(("torch.nn.", "initperf.")) else name
    return None


def _fans_of(place: Place) -> Tensor:
    """The parameter, seen as (outputs, inputs, ...)."""
    return place.parameter.t() if _is_transformers_conv1d(place.module) else place.parameter


_RESIDUAL = ("c_proj", "o_proj", "down_proj")
_TORCH_RESIDUAL = ("self_attn.out_proj", "multihead_attn.out_proj", "linear2")


def residual_projections(model: nn.Module) -> frozenset[str]:
    """Paths of the layers that add to a residual stream: c_proj, o_proj, down_proj, and those of torch's Transformer layers."""
    found = set()
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in _RESIDUAL and next(module.parameters(recurse=False), None) is not None:
            found.add(path)
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            prefix = f"{path}." if path else ""
            found |= {prefix + name for name in _TORCH_RESIDUAL if name in dict(module.named_modules())}
    return frozenset(found)


def _gpt2(place: Place) -> Init:
    """normal(0.02); projections into the residual stream / sqrt(their number), which is 2 a layer (Radford et al. 2019)."""
    return normal(0.02 / math.sqrt(len(place.residual)) if place.path in place.residual else 0.02)


def _timm(place: Place) -> Init:
    """Convolutions: kaiming_normal, fan_out (timm's ResNet); linear layers and all else: trunc_normal(0.02) (timm's ViT)."""
    if isinstance(place.module, ConvNd) or (_is_compressed(place.module) and place.parameter.dim() > 2):
        return normal(_he(place.parameter, math.sqrt(2.0), fan_out=True))
    return trunc_normal(0.02)


# weights of two and more dimensions
SCHEMES: dict[str, Callable[[Place], Init]] = {
    "kaiming_normal": lambda p: normal(_he(_fans_of(p), math.sqrt(2.0))),
    "kaiming_uniform": lambda p: uniform(math.sqrt(3.0) * _he(_fans_of(p), math.sqrt(2.0))),
    "xavier_normal": lambda p: normal(_glorot(p.parameter)),
    "xavier_uniform": lambda p: uniform(math.sqrt(3.0) * _glorot(p.parameter)),
    "trunc_normal": lambda p: trunc_normal(0.02),
    "orthogonal": lambda p: Init("orthogonal", (1.0,)),
    "gpt2": _gpt2,
    "timm": _timm,
}
_EMBEDDED = ("trunc_normal", "gpt2", "timm")  # schemes that mean embeddings too; with the others those are N(0, 1)
NAMES = (*SCHEMES, "torch", "zeros", "ones", "keep")


def written(text: str) -> Init:
    """The Init of "normal(0, 0.02)", "uniform(-1, 1)", ...: a function of Init and its numbers."""
    call = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text)
    if call is None:
        fail("a scheme as NAME(NUMBER, ...)", repr(text))
    try:
        return Init(call[1], tuple(float(number) for number in call[2].split(",")))
    except ValueError:
        fail("a scheme as NAME(NUMBER, ...), such as 'normal(0, 0.02)'", repr(text))


def named(scheme: str, place: Place, by_itself: Init | None, ruled: bool = False) -> Init | None:
    """What a named scheme gives a parameter; None if it says nothing about it. `by_itself`: its own distribution, if known.

    Weights of two and more dimensions get the scheme, other matrices if a rule names them (`ruled`); biases 0; norms 1
    and 0 and PReLU its own; embeddings as above.
    """
    if scheme in ("zeros", "ones"):
        return constant(scheme == "ones")
    if scheme == "torch" or isinstance(place.module, (*NORMS, nn.PReLU)):
        return by_itself
    if isinstance(place.module, EMBEDDINGS) and scheme not in _EMBEDDED:
        return by_itself
    if place.parameter.dim() == 1:
        return constant(0) if "bias" in place.leaf else None
    known = by_itself is not None or place.leaf.endswith("weight") or (ruled and place.parameter.dim() > 1)
    return SCHEMES[scheme](place) if known and place.leaf not in ("bias_k", "bias_v") else by_itself
