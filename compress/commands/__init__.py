"""The commands of the command line, one module per group; ``compress/cli.py`` puts them together.

Heavy imports live inside the commands: ``packlight --help`` loads click and nothing more.
"""
