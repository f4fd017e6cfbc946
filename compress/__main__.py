"""The ``packlight`` command, and ``python -m compress``."""

from __future__ import annotations

import sys

from compress import machine


def main() -> None:
    """Exit codes 0, 1 (a gate failed), 2 (could not run), 128 + n (ended by signal n)."""
    machine.own_process()
    try:
        from compress.cli import run

        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:  # before the command line could catch it
        sys.exit(130)
    finally:
        machine.ignore_signals()


if __name__ == "__main__":
    main()
