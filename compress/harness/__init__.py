"""Tasks of EleutherAI's lm-evaluation-harness, answered by a ``Runtime``.

The harness reads data sets, makes prompts and computes metrics; this package gives it one model
class (``language_model.py``) for every artifact and for the float model. Needs ``packlight[eval]``.
"""
