"""SIGINT (Ctrl-C), SIGTERM (what a scheduler sends), SIGHUP (a terminal that goes away): the step is finished, saved,
and the run ends with 130, 143 or 129.

While a model trains, the first signal only asks, and the loop looks at `asked` once a step. At any other time, and at
the second signal, the run ends where it is: a checkpoint is complete or absent, so that loses nothing but the step.
"""

import contextlib
import os
import signal
import threading

from nanorlhf import parallel
from nanorlhf.errors import Stopped, signal_name

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """install() and restore() put the handlers in and out; `patient` says whether a signal waits for the step's end.

    way_on: what a run that ends at once says after its reason.
    """

    def __init__(self, way_on):
        self.asked: int | None = None  # the signal that asked
        self.patient = False
        self._way_on = way_on
        self._before = {}

    def install(self) -> None:
        """Take the signals over, in the main thread (Python has handlers nowhere else), but for one that is ignored:
        a shell starts its background jobs with SIGINT ignored, and nohup its command with SIGHUP ignored."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in HANDLED:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back what handled the signals before."""
        while self._before:
            signal.signal(*self._before.popitem())

    def check(self) -> None:
        """Raise Stopped for a signal whose own exception was lost: Python ignores one that is raised in a __del__."""
        if self.asked is not None and not self.patient:
            raise Stopped(self.asked, f"stopped by {signal_name(self.asked)} at once{self._way_on()}")

    def _handle(self, number: int, frame) -> None:
        at_once = self.asked is not None or not self.patient
        self.asked = number
        if at_once:
            raise Stopped(number, f"stopped by {signal_name(number)} at once{self._way_on()}")
        line = f"{signal_name(number)}: finishing this step and saving; once more stops at once\n"
        if not parallel.first():
            return
        with contextlib.suppress(OSError):  # the terminal may be what has gone away
            os.write(2, (os.isatty(2) * "\n" + line).encode())  # not print, which it may have come in the middle of
