"""Another name of initperf.tickets.ticket, the one to write: the same module object."""

import sys

from initperf.tickets import ticket
from initperf.tickets.ticket import *  # noqa: F403 -- for type checkers

sys.modules[__name__] = ticket
