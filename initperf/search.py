"""Another name of initperf.tickets.search, the one to write: the same module object."""

import sys

from initperf.tickets import search
from initperf.tickets.search import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = search
