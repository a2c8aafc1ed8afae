"""torch.nn.init, faster and the same bits everywhere: `from initperf import init` instead of `from torch.nn import init`.

What samples comes from initperf.init.torch_init; what does not is torch's own object. Beyond torch's names:
initialize, fast_init, describe, describe_file, sample_into, sample_shard_into and
sample_survivors_into.
"""

# ruff: noqa: F401 -- re-exports; __all__ starts from torch's own list

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch.nn import init as _torch_init
from torch.nn.init import (
    calculate_gain,
    constant,
    constant_,
    dirac,
    dirac_,
    eye,
    eye_,
    ones_,
    zeros_,
)

from initperf.core.torch_private import correct_fan as _calculate_correct_fan
from initperf.core.torch_private import fans as _calculate_fan_in_and_fan_out
from initperf.init.schemes import Init
from initperf.init.torch_init import (
    kaiming_normal,
    kaiming_normal_,
    kaiming_uniform,
    kaiming_uniform_,
    normal,
    normal_,
    orthogonal,
    orthogonal_,
    sparse,
    sparse_,
    trunc_normal_,
    uniform,
    uniform_,
    xavier_normal,
    xavier_normal_,
    xavier_uniform,
    xavier_uniform_,
)
from initperf.rng.sampling import sample_into, sample_shard_into, sample_survivors_into

if TYPE_CHECKING:
    from initperf.init.identify.identify import Description, describe, describe_file
    from initperf.init.model.model import Initialized, initialize
    from initperf.init.redirect import fast_init

__all__ = [
    *_torch_init.__all__,
    "Description",
    "Init",
    "Initialized",
    "describe",
    "describe_file",
    "fast_init",
    "initialize",
    "sample_into",
    "sample_shard_into",
    "sample_survivors_into",
]

_LATER = {  # what imports much, imported when first asked for
    "Description": "initperf.init.identify.identify",
    "Initialized": "initperf.init.model.model",
    "describe": "initperf.init.identify.identify",
    "describe_file": "initperf.init.identify.identify",
    "fast_init": "initperf.init.redirect",
    "initialize": "initperf.init.model.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'initperf.init' has no attribute {name!r}")
    value = getattr(import_module(_LATER[name]), name)
    globals()[name] = value
    return value
