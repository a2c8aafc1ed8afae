"""Another name of initperf.variance.callbacks, the one to write: the same module object."""

import sys

from initperf.variance import callbacks
from initperf.variance.callbacks import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = callbacks
