"""``python -m compress`` is the ``packlight`` command."""

from compress.cli import main

main()
