"""Output that goes away must not end a run: what it prints is for people who look, its files hold everything.

A reader may close a pipe (`| head`), a terminal may go (ssh breaks off), a disk behind `> log` may be full, and a
stream may be closed from the start (`>&-`). From then on that stream is /dev/null, and the run goes on.
"""

import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from nanorlhf.errors import one_sentence


class Lasting:
    """A text stream that falls silent where its other end is gone, instead of raising."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _try(self, call, *args) -> None:
        try:
            call(*args)
        except BlockingIOError:  # a pipe whose other owner made it non-blocking, and which is full: wait for the reader
            os.set_blocking(self._stream.fileno(), True)
            self._try(self._stream.flush)
        except OSError:  # EPIPE, EIO, ENOSPC, EBADF
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # also for what is buffered, for C code, and for child processes
            os.close(null)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, sys.stdin, stdout and stderr are there and nothing that is printed can fail."""
    before = sys.stdin, sys.stdout, sys.stderr
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: or else the next file that is opened would get this number, and be printed into
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    sys.stdout, sys.stderr = (
        Lasting(stream or open(os.devnull, "w", encoding="utf-8")) for stream in (sys.stdout, sys.stderr)
    )
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="as_typed")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def as_command(main: Callable[[], object]) -> None:
    """What stands below `if __name__ == "__main__"` in a command that has no Config (config.cli is for those that have
    one): output that goes away ends nothing, and what a user can cause is one sentence and exit status 2."""
    with lasting_streams(), one_sentence():
        main()


def _as_typed(error: UnicodeError) -> tuple[bytes, int]:
    """For characters that the terminal's encoding lacks: "?", but a byte of a file's name as it was typed."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return b"".join(bytes([ord(c) - 0xDC00]) if "\udc80" <= c <= "\udcff" else b"?" for c in wrong), error.end


codecs.register_error("as_typed", _as_typed)
