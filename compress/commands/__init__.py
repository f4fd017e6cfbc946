"""The commands of the command line, one module per group; ``compress/cli.py`` registers them.

Heavy imports are inside the commands: ``packlight --help`` imports only click.
"""
