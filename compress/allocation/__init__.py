"""Chooses the grid of each tensor, so that the file fits a budget of bytes with the least KL
divergence from the float model.

    choices.py      the candidate grids of each tensor, with exact bytes; the recipe's floors
    effort.py       how much is measured: a sample of a large model
    sensitivity.py  KL divergence per unit of error in each tensor, to second order
    costs.py        error of each tensor on each grid times its sensitivity; cached on disk
    solver.py       the least cost within the bytes
    budget.py       from a budget to a plan
    limits.py       bytes of a file within a budget of memory
    step.py         the step of a build
    feasible.py     refuses a budget that no file fits in, with hints
    explain.py      the choice in plan.json and on the terminal
    lock.py         the grids of a plan.json

None of them knows a format: candidate grids come from the exporter.
"""
