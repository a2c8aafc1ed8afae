"""Another name of initperf.core.ops, the one to write: the same module object."""

import sys

from initperf.core import ops
from initperf.core.ops import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = ops
