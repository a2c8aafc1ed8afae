"""`python -m initperf`: the command line, also of a clone that is not installed."""

import sys

from initperf.cli import main

sys.exit(main())
