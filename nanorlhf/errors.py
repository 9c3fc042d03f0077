"""What a user can cause: the exceptions, and the one sentence with exit status 2 in which they end."""

import contextlib
import errno
import signal
import sys
import typing
from collections.abc import Iterator
from typing import Any


class UserError(ValueError):
    """What a user can cause and fix: printed as one sentence, exit status 2, no traceback."""


class NotFinite(UserError):
    """A number of the training is nan or infinite. `what` names it; the run adds step, samples and the way on.
    every: it is so in each sample of the step, so that no step can be expected to be without."""

    def __init__(self, what: str, every: bool = False):
        super().__init__(f"{what}, expected finite numbers")
        self.what, self.every = what, every


class Stopped(KeyboardInterrupt):
    """A signal ended the run: exit status 128 + its number, as a shell says it. Its text ends in how to go on."""

    def __init__(self, number: int, text: str):
        super().__init__(text)
        self.status = 128 + number


def signal_name(number: int) -> str:
    """SIGINT, SIGTERM."""
    return signal.Signals(number).name


def check(ok: bool, name: str, got: Any, expected: str, fix: str = "") -> None:
    """Raises UserError in the house wording unless ok: name, got, expected, fix.

    check(cfg.temperature > 0, "temperature", cfg.temperature, "greater than 0", "choose 0.7")
    says "temperature 0.0 is not greater than 0: choose 0.7". A NaN fails every comparison, so it is refused too.
    """
    if not ok:
        raise UserError(f"{name} {got} is not {expected}" + (f": {fix}" if fix else ""))


@contextlib.contextmanager
def one_sentence(again: str = "") -> Iterator[None]:
    """What a user can cause inside ends in one sentence on stderr and exit status 2. again: how to go on after it."""
    try:
        yield
    except UserError as error:
        stop(2, f"error: {one_line(str(error))}")
    except OSError as error:
        remedy = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
            errno.EIO: "check the disk",
            errno.EACCES: "check who owns it",
            errno.EROFS: "run where you may write",
        }
        if error.errno not in remedy:
            raise
        where = f": {error.filename}" if error.filename else ""
        stop(2, f"error: {error.strerror}{where}: {remedy[error.errno]}" + (f" and {again}" if again else ""))
    except Stopped as stopped:
        stop(stopped.status, str(stopped))
    except KeyboardInterrupt:
        stop(130, "interrupted" + (f": {again}" if again else ""))


def one_line(text: str, longest: int = 1000) -> str:
    """An error's text as it is printed: what a damaged file holds is no line break, no escape sequence and no novel."""
    # "\udc80" to "\udcff" are bytes of a file's name, in a locale that cannot read it
    text = "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else " " for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def may_speak() -> bool:
    """Whether this process may say why a run ends: under torchrun one of them does (parallel.py puts its own here)."""
    return True


def stop(status: int, line: str) -> typing.NoReturn:
    if may_speak():
        print(line, file=sys.stderr, flush=True)
    sys.exit(status)
