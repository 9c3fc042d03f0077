"""What torchrun does on one machine, without its seconds of imports: N processes forked from one that has them all.

Each finds torchrun's variables in its environment and a table (TCPStore) that outlives it; the first that fails ends
the others. So tests, bench.parallel and the faults start two or three CPU processes of the real scripts in a fraction
of a second; that torchrun itself does the same is one test of its own (tests/test_parallel.py).
"""

import faulthandler
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch._dynamo  # FSDP imports it, 1.4 s, and a run the next ones: here once, not in every process
import torch.distributed as dist
import torch.distributed.fsdp
import torch.utils.tensorboard

# Torch asks a name server who 127.0.0.1 is, for each connection; where an answer is lost it waits 5 seconds, of the 45
# that processes have to meet. The C library reads this before its first question.
os.environ.setdefault("RES_OPTIONS", "timeout:1")
GRACE = 30.0  # seconds from SIGTERM to SIGKILL, torchrun's
POLL = 0.05


class Launched:
    """`size` processes that do `work()` in the current folder. `said`: what each printed, once they have ended.

    variables: more of their environment
    """

    def __init__(self, work: Callable[[], None], size: int, **variables: str):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._outputs = [tempfile.NamedTemporaryFile(prefix="nanorlhf-said-") for _ in range(size)]
        self.statuses: list[int | None] = [None] * size
        self.pids = []
        # Nobody begins before all are forked. Whom the store accepts it looks up by name, and who is forked meanwhile
        # has the lock of the C library's resolver, held by a thread that it has not.
        begin, hold = os.pipe()
        for rank in range(size):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._store.port}
            given |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0} | variables
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                os.close(hold)
                os.read(begin, 1)  # ends when nobody holds the other end
                os.environ |= {name: str(value) for name, value in given.items()}
                _live(work, self._outputs[rank].fileno())
            self.pids.append(pid)
        os.close(begin)
        os.close(hold)

    def poll(self) -> bool:
        """Whether all have ended; notes those that have."""
        for rank, pid in enumerate(self.pids):
            if self.statuses[rank] is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                code = os.waitstatus_to_exitcode(found[1])
                self.statuses[rank] = code if code >= 0 else 128 - code  # as a shell says it: 137 for a SIGKILL
        return None not in self.statuses

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one of them, or to all that are left."""
        for i, pid in enumerate(self.pids):
            if self.statuses[i] is None and rank in (None, i):
                os.kill(pid, number)

    def wait(self, limit: float = 300.0) -> list[int]:
        """Their exit statuses. Ends the others when one has failed, as torchrun does, and all of them after `limit`."""
        begun, ending = time.monotonic(), None
        while not self.poll():
            now = time.monotonic()
            if ending is None and (any(self.statuses) or now > begun + limit):
                if now > begun + limit:
                    self.send(signal.SIGUSR1)  # says where it waits
                self.send(signal.SIGTERM)
                ending = now
            elif ending is not None and now > ending + GRACE:
                self.send(signal.SIGKILL)
            time.sleep(POLL)
        return self.statuses

    @property
    def said(self) -> list[str]:
        return [Path(file.name).read_text(encoding="utf-8", errors="replace") for file in self._outputs]


def _live(work: Callable[[], None], output: int) -> NoReturn:
    """The life of a forked process."""
    # What the parent has thrown away and not collected yet is its own. Collected here, the store of an earlier launch
    # would wait for a thread that no fork takes along, and this process with it.
    gc.freeze()
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)  # as torchrun does it; and a pool of threads does not survive a fork
    status = 70
    faulthandler.register(signal.SIGUSR1, file=2)  # where it is: kill -USR1
    try:
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False, encoding="utf-8") for number in (1, 2))
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
