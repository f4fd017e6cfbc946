"""Which tensor gets which grid, so that the file fits a number of bytes and says most what the
float model says.

    choices.py      what there is to choose, with exact bytes; the recipe's floors
    effort.py       how much is measured: a sample of a large model
    sensitivity.py  what the model's output makes of an error in each tensor: noise, walked through
    costs.py        the error of each tensor on each grid, times that; kept for the next budget
    solver.py       the least cost within the bytes
    budget.py       from a budget to a plan
    limits.py       what a budget leaves for a file
    step.py         the step of a build
    feasible.py     a budget that no file fits in: refused, with what would reach it
    explain.py      what is told of it
    lock.py         plan.json, and back

None of them knows a format: what a tensor may be stored as comes from its exporter.
"""
