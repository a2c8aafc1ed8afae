"""Another name of initperf.layers.choice.table, the one to write: the same module object."""

import sys

from initperf.layers.choice import table
from initperf.layers.choice.table import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = table
