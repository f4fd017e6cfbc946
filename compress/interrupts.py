"""Ctrl-C, SIGTERM and SIGHUP unwind a command, so that nothing half-written stays behind.

Python's own way, an exception wherever the signal finds us, has two holes. Libraries catch whatever
ends an import of theirs and go on with half a module, and then torch crashes the process before
its folders are cleared: so an interruption waits until an import is over. And an exception inside
a callback from C or a finalizer is lost: so it is raised again until it is under way.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

LOOK_AGAIN = 0.05  # seconds until the next look at what has become of an interruption
ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def install() -> None:
    """Handle the signals that end a command; those that are ignored (nohup) stay ignored.

    SIGINT becomes KeyboardInterrupt, the others ``SystemExit(128 + signal)``, as shells count. A
    second one does not disturb the cleaning up after the first.
    """
    ending: BaseException | None = None

    def arrive(number: int, frame: FrameType | None) -> None:
        nonlocal ending
        if ending is None:
            ending = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN)
        if not is_importing(frame) and not is_unwinding(ending):
            raise ending

    def hush(lost: sys.UnraisableHookArgs) -> None:
        if ending is None or lost.exc_value is not ending:
            report_lost(lost)

    report_lost, sys.unraisablehook = sys.unraisablehook, hush
    for number in ENDINGS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, arrive)
    signal.signal(signal.SIGALRM, arrive)


def uninstall() -> None:
    """Deaf from here on: for the moments between the last word of a command and its end."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in (*ENDINGS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a frame, or any that called it, belongs to Python's import machinery."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def is_unwinding(ending: BaseException) -> bool:
    """Whether ``finally`` and ``except`` clauses are at work on an exception right now."""
    error = sys.exc_info()[1]
    while error is not None:
        if error is ending:
            return True
        error = error.__context__
    return False
