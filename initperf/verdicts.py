"""Another name of initperf.variance.verdicts, the one to write: the same module object."""

import sys

from initperf.variance import verdicts
from initperf.variance.verdicts import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = verdicts
