"""A process to which something happens: killed before its n-th file operation, out of disk, without rights, in a time
that jumps. Forked from one that has imported everything, so that a trial takes no longer than its work."""

import contextlib
import ctypes
import fcntl
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
HANGS = 300  # seconds after which a process is ended, as a failure


class Process:
    """A forked process that does `work`, in the current folder.

    kill_before: it kills itself before its n-th file operation; max_file: no file may grow past so many bytes; counter:
    a file that gets the number of its operations; unprivileged: what is read-only is so for root, too; jumps: the seed
    of a clock that is set back and forth by hours.
    """

    def __init__(self, work: Callable[[], None], *, kill_before: int = 0, max_file: int = 0, counter: str = "",
                 unprivileged: bool = False, jumps: int | None = None):  # fmt: skip
        reader, writer = os.pipe()  # not a file: max_file would hit it
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            if unprivileged:
                obey_permissions()
            if jumps is not None:
                set_clocks(jumps)
            live(work, kill_before, max_file, counter)
        os.close(writer)
        self._reader, self.said = reader, ""

    def wait(self) -> int:
        """Its exit status as a shell says it: 137 for a SIGKILL. Then `said` is what it printed."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with open(self._reader, encoding="utf-8", errors="replace") as output:
            self.said = output.read()
        return code if code >= 0 else 128 - code


def live(work: Callable[[], None], kill_before: int, max_file: int, counter: str) -> NoReturn:
    """The life of the forked process."""
    status, operations = 70, 0

    def hook(event, args):
        nonlocal operations
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITES):
            operations += 1
            if operations == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        signal.alarm(HANGS)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, encoding="utf-8") for number in (1, 2))
        sys.addaudithook(hook)
        if max_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
        work()
        if counter:
            Path(counter).write_text(str(operations), encoding="utf-8")
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def obey_permissions() -> None:
    """Give up root's right to write where nobody may (CAP_DAC_OVERRIDE, number 1); others never had it."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    failed = libc.capget(header, sets)
    sets[0] &= ~(1 << 1)  # of the sets, effective is the first and permitted the second
    sets[1] &= ~(1 << 1)
    if failed or libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def set_clocks(seed: int) -> None:
    """Let time.time and time.monotonic jump by up to six hours, forward or back, at one reading in twenty."""
    chance = random.Random(seed)
    off = {}

    def jumping(clock: Callable[[], float]) -> Callable[[], float]:
        def now() -> float:
            if chance.random() < 0.05:
                off[clock] = chance.uniform(-6, 6) * 3600
            return clock() + off.get(clock, 0.0)

        return now

    time.time, time.monotonic = jumping(time.time), jumping(time.monotonic)


def watch(seconds: float, look: Callable[[], None]) -> None:
    """Look, again and again, for that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        look()
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))


def send(process: Process, *signals: int) -> int:
    """Send signals to a process, one after another. Returns its exit status."""
    for number in signals:
        os.kill(process.pid, number)
        time.sleep(0.01)
    return process.wait()


@contextlib.contextmanager
def read_only(path: Path):
    """Nobody may write to a file or folder, as long as it stands there."""
    mode = path.stat().st_mode
    with contextlib.suppress(FileNotFoundError):
        path.chmod(mode & ~0o222)
    yield
    with contextlib.suppress(FileNotFoundError):  # removed or renamed meanwhile
        path.chmod(mode)
