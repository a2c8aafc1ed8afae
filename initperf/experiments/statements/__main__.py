"""python -m initperf.experiments.statements: see statements.py."""

import sys

from initperf.experiments.statements.statements import main

sys.exit(main())
