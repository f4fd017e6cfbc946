"""Pruning: a checkpoint seen with fewer blocks, narrower MLPs or fewer heads.

cut.py      how much goes: arithmetic on the config, before any work
depth.py    which blocks go: the ones whose absence changes the logits least
width.py    which channels or heads go, block by block, and the update of what stays
surgery.py  the algebra of both: ranking and least squares on a Hessian
pruned.py   the ``Source`` that is seen in the end
step.py     the step of a build, and what the report says of it
"""
