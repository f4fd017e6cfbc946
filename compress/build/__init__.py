"""``packlight build``: decide, write, verify, report."""
