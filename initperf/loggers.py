"""Another name of initperf.variance.loggers, the one to write: the same module object."""

import sys

from initperf.variance import loggers
from initperf.variance.loggers import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = loggers
