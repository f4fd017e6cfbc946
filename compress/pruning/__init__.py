"""Pruning: removes blocks, MLP channels, heads or single weights from a checkpoint.

options.py     ``--prune`` as the recipe's ``prune``; ``compress.plan.cut`` has the pruned shape
depth.py       selects blocks: those whose removal changes the logits least
width.py       selects channels or heads, block by block, and updates the remaining weights
surgery.py     the algebra of both: ranking and least squares on a Hessian
heal.py        trains the remaining weights
sparse.py      zeros single weights; zeros.py: the formats that store zeros in no space
transforms.py  sparsity and folds as transforms of a target
pruned.py      the ``Source`` of the pruned model
step.py        the step of a build, and its notes in the report
"""
