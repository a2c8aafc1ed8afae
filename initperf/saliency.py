"""Another name of initperf.tickets.saliency, the one to write: the same module object."""

import sys

from initperf.tickets import saliency
from initperf.tickets.saliency import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = saliency
