"""What this process may use of the machine: in a container less than there is."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that the process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes that may be taken without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)
