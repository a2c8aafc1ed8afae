"""The truth for describe: while recording, every call that gives a tensor its random values is noted beside its memory."""

import math
import sys
from contextlib import contextmanager
from unittest import mock

from torch import Tensor, nn

from initperf import rng
from initperf.init import Init


class Recording:
    """Distribution of whole tensors by address, as the calls said, after scaling by numbers; None where it cannot be said."""

    def __init__(self):
        self._found = {}

    def note(self, tensor, init):
        self._found[tensor.data_ptr(), tensor.numel()] = init

    def scale(self, tensor, factor):
        key = tensor.data_ptr(), tensor.numel()
        if self._found.get(key) is not None:
            number = float(factor) if not isinstance(factor, Tensor) or factor.numel() == 1 else None
            self._found[key] = self._found[key].scaled(number) if number is not None else None

    def of(self, parameter):
        return self._found.get((parameter.data_ptr(), parameter.numel()))


def _truncated(recording, original):
    def trunc_normal_(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0, generator=None):
        result = original(tensor, mean, std, a, b)
        recording.note(tensor, Init("trunc_normal", (mean, std, a, b)))
        return result

    return trunc_normal_


@contextmanager
def recording():
    """Code in the block runs unchanged; yields the Recording. What torch.nn.init and Tensor's methods do in place is seen."""
    found = Recording()
    normal_, uniform_, mul_, div_, copy_ = Tensor.normal_, Tensor.uniform_, Tensor.mul_, Tensor.div_, Tensor.copy_

    def normal(self, mean=0.0, std=1.0, **kwargs):
        found.note(self, Init("normal", (float(mean), float(std))))
        return normal_(self, mean, std, **kwargs)

    def uniform(self, *args, **kwargs):
        low, high = (
            (*args, kwargs.get("from", 0.0), kwargs.get("to", 1.0))[:2] if len(args) != 1 else (*args, kwargs["to"])
        )
        found.note(self, Init("uniform", (float(low), float(high))))
        return uniform_(self, *args, **kwargs)

    def multiplied(self, other):
        found.scale(self, other)
        return mul_(self, other)

    def divided(self, other, **kwargs):
        found.scale(self, 1 / other)
        return div_(self, other, **kwargs)

    def copied(self, *args, **kwargs):
        found.note(self, None)
        return copy_(self, *args, **kwargs)

    methods = {"normal_": normal, "uniform_": uniform, "mul_": multiplied, "div_": divided, "copy_": copied}
    patches = [mock.patch.object(Tensor, name, function) for name, function in methods.items()]
    patches.append(
        mock.patch.object(nn.init, "_no_grad_trunc_normal_", _truncated(found, nn.init._no_grad_trunc_normal_))
    )
    if "timm.layers.weight_init" in sys.modules:
        timm = sys.modules["timm.layers.weight_init"]
        patches.append(mock.patch.object(timm, "_trunc_normal_", _truncated(found, timm._trunc_normal_)))
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


def _same(a, b):
    """Whether two distributions are one; a normal cut beyond 8 standard deviations is that normal."""
    a, b = (Init("normal", i.args[:2]) if _uncut(i) else i for i in (a, b))
    return a.function == b.function and all(
        math.isclose(x, y, rel_tol=1e-3) for x, y in zip(a.args, b.args, strict=True)
    )


def _uncut(init):
    return (
        init.function == "trunc_normal"
        and min(init.args[0] - init.args[2], init.args[3] - init.args[0]) > 8 * init.args[1]
    )


def judge(model, recording, description, least=1000):
    """Findings of tensors of `least` and more values: (right, wrong), each wrong one with the truth.

    Right: the named scheme means the distribution that was drawn from; or, for values that nothing random gave, the scheme
    is not one of random values and not "trained".
    """
    parameters = {rng.canonical_name(n): p for n, p in model.named_parameters()}
    right, wrong = [], []
    for finding in description.findings:
        if math.prod(finding.shape) < least:
            continue
        truth = recording.of(parameters[finding.name])
        if finding.low == finding.high:
            good = finding.scheme in ("zeros", "ones") or finding.scheme.startswith("constant")
        elif truth is None:
            good = finding.init is None and finding.scheme.startswith(
                ("sinusoids", "equal rows", "eye", "dirac", "orthogonal")
            )
        else:
            good = finding.init is not None and _same(finding.init, truth) and "no known scheme" not in finding.scheme
        (right if good else wrong).append((finding, truth))
    return right, wrong
