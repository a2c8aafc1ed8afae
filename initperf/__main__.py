"""`initperf`, and `python -m initperf` of a clone that is not installed: the command line, or what to install for it."""

from __future__ import annotations

import sys


def main(args: list[str] | None = None) -> int:
    """Run the command line; without the extra that it needs, say so: exit code 1."""
    try:
        from initperf.cli.main import main as run
    except ImportError as error:
        from initperf.core.checks import InitPerfImportError

        if not isinstance(error, InitPerfImportError):
            raise
        print(f"initperf: {error}", file=sys.stderr)
        return 1
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
