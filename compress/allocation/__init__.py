"""Which tensor gets which grid, so that the file fits a budget of bytes with the least KL
divergence from the float model.

    choices.py      the candidate grids of each tensor, with exact bytes; the recipe's floors
    effort.py       how much is measured: a sample of a large model
    sensitivity.py  KL divergence per unit of error in each tensor, measured with noise
    costs.py        error of each tensor on each grid times its sensitivity; cached on disk
    solver.py       the least cost within the bytes
    budget.py       from a budget to a plan
    limits.py       what a budget leaves for a file
    step.py         the step of a build
    feasible.py     a budget that no file fits in: refused, with what would reach it
    explain.py      the choice in plan.json and on the terminal
    lock.py         the grids of a plan.json

None of them knows a format: what a tensor may be stored as comes from its exporter.
"""
