"""torch.nn.init, faster and the same bits everywhere: `from initperf import init` instead of `from torch.nn import init`.

What samples comes from initperf.dropins; what does not is torch's own object. Beyond torch's names:
initialize, fast_init, describe, describe_file, sample_into, sample_shard_into and
sample_survivors_into.
"""

# ruff: noqa: F401 -- re-exports; __all__ starts from torch's own list

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
from initperf.dropins import (
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
from initperf.explain import Description, describe, describe_file
from initperf.model_init import Initialized, initialize
from initperf.redirect import fast_init
from initperf.sampling import sample_into, sample_shard_into, sample_survivors_into
from initperf.schemes import Init

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
