"""The exceptions that end a run on purpose."""

import signal


class UserError(ValueError):
    """What a user can cause and fix: printed as one sentence, exit status 2, no traceback."""


class NotFinite(UserError):
    """A number of the training is nan or infinite. `what` names it; the run adds step, samples and the way on."""

    def __init__(self, what: str):
        super().__init__(f"{what}, expected finite numbers")
        self.what = what


class Stopped(KeyboardInterrupt):
    """A signal ended the run: exit status 128 + its number, as a shell says it. Its text ends in how to go on."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.status = 128 + number


def signal_name(number: int) -> str:
    """SIGINT, SIGTERM."""
    return signal.Signals(number).name
