"""Several processes train one model, a GPU each: who is who, and how what each of them has comes together.

    torchrun --standalone --nproc_per_node 8 train_ppo.py        sets RANK, WORLD_SIZE, LOCAL_RANK and an address
    python train_ppo.py                                          one process: all of this is the identity

Every process runs the whole script. Models lie on all of them in parts (sharding.py), posts are shared out
(packing.share_out), and what the posts gave is gathered, so that the arithmetic of a batch is done on all its rows by
every process, alike. Process 0 owns console, run folder and trackers; what ends a run is said once, by the process that
knows it. docs/parallel.md has the picture.

Two kinds of messages: tensors of a model and of a batch go over the devices' own network (NCCL on GPUs), what
processes tell one another, as JSON, over gloo, which notices at once when one of them is gone.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanorlhf import errors
from nanorlhf.errors import Stopped, UserError, check, signal_name

if TYPE_CHECKING:  # torch is imported where it is used: flags alone should not wait for it
    import torch.distributed as dist
    from torch import Tensor

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
MEET = timedelta(seconds=45)  # all processes have come by then, or the run ends
WAIT = timedelta(hours=24)  # for what process 0 does alone: a save, a judge. One that is gone is noticed at once
LINGER = 3.0  # seconds that a process which was left by another waits for that one to say why


class _Process(NamedTuple):
    rank: int  # 0 to size - 1
    size: int
    store: "dist.Store"  # a table that all can read and write, also while another is gone
    device_type: str = "cpu"  # cuda or cpu: where the models are


_me: _Process | None = None
way_on: Callable[[], str] = str  # how to go on with this run, the end of a last message (run.py)


def launched() -> bool:
    """Whether torchrun, or who sets its variables, started this process."""
    return "RANK" in os.environ


def on() -> bool:
    """Whether models are in parts and work is shared out: inside `group`, with one process too."""
    return _me is not None


def rank() -> int:
    return _me.rank if _me else 0


def size() -> int:
    return _me.size if _me else 1


def first() -> bool:
    """Whether this is the process that writes: 0."""
    return rank() == 0


# --- meeting and parting ---------------------------------------------------------------------------------------------


def own_device(name: str) -> str:
    """auto, cpu, cuda -> this process's: cuda is its own one of the machine's GPUs. Raises UserError for fewer GPUs."""
    if not launched() or name.startswith("cpu"):
        return name
    import torch

    if name == "auto" and not torch.cuda.is_available():
        return name
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    check(name in ("auto", "cuda"), "device", name, "auto, cuda or cpu under torchrun", "it gives each process a GPU")
    check(here <= gpus, "--nproc_per_node", here, f"at most the {gpus} GPUs of {socket.gethostname()}", "take fewer")
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"


@contextlib.contextmanager
def group(device: str, what: Any = None) -> Iterator[None]:
    """Inside, the processes that torchrun started are one run; without torchrun nothing happens.

    args: device: the flag; what: must be the same on all of them, like the code: flags
    Raises UserError for variables that are missing, processes that do not come, more of them than GPUs, or a torch
    without NCCL.
    """
    global _me
    if not launched():
        yield
        return
    import torch
    import torch.distributed as dist

    for name in VARIABLES:
        check(name in os.environ, f"environment variable {name}", "(none)", "set, though RANK is",
              "start with `torchrun --standalone --nproc_per_node N`, or unset RANK")  # fmt: skip
    device = own_device(device)
    if device.startswith("cuda"):
        check(dist.is_nccl_available(), "torch", torch.__version__, "built with NCCL, which GPUs talk with",
              "install a CUDA build of torch for Linux")  # fmt: skip
        torch.cuda.set_device(torch.device(device))
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=MEET))
        store = dist.PrefixStore("nanorlhf", store)
        store.set(f"here {rank}", "yes")
        store.wait([f"here {i}" for i in range(size)], MEET)
    except RuntimeError as error:  # torch's DistError is one
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        errors.may_speak = lambda: True  # nobody can be asked
        raise UserError(
            f"rendezvous: process {rank} of {size} did not meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {MEET.seconds} s, expected all of them: start them all with torchrun, "
            f"and check that the address can be reached ({errors.one_line(str(error), 200)})"
        ) from None
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
    _me = _Process(rank, size, store, "cuda" if device.startswith("cuda") else "cpu")
    handler = signal.signal(signal.SIGTERM, _stop_at_once)  # until here it ends a process that waits for others
    check_same("torch", torch.__version__)
    check_same("code", _code())
    check_same("flags", what)
    yield  # after an error the others may be waiting for this process: then the group ends with it (`one_voice`)
    barrier()  # who leaves first may take the address along at which the others are connected
    _me = None
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, handler)


def _code() -> str:
    """SHA-256 of the sources that run."""
    root = Path(__file__).parents[1]
    files = [*root.glob("*.py"), *(root / "nanorlhf").rglob("*.py"), *(root / "kernels").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def check_same(name: str, value: Any) -> None:
    """Raises UserError, on every process, unless all have the same `value` (anything that JSON can hold)."""
    if size() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
    found = gathered([digest, socket.gethostname()])
    other = [f"{i} on {host}" for i, (theirs, host) in enumerate(found) if theirs != found[0][0]]
    check(not other, name, f"of process {' and '.join(other)}", f"the same as that of process 0 on {found[0][1]}",
          "all processes need the same code, flags and data")  # fmt: skip


def check_enough(name: str, posts: int) -> None:
    """Raises UserError for more processes than posts, of which some would never have work."""
    check(size() <= posts, "--nproc_per_node", size(), f"at most {name} {posts}", "take fewer processes or more posts")


# --- what processes tell one another ---------------------------------------------------------------------------------


def barrier() -> None:
    """Wait until all processes are here."""
    if size() > 1:
        most(0)


def most(number: int) -> int:
    """The largest of the processes' numbers."""
    if size() == 1:
        return number
    import torch
    import torch.distributed as dist

    one = torch.tensor([number])
    dist.all_reduce(one, op=dist.ReduceOp.MAX)
    return int(one)


def gathered(value: Any) -> list:
    """[what each process has], on every process, by way of JSON: a tuple becomes a list, and nothing is unpickled."""
    if size() == 1:
        return [json.loads(json.dumps(value))]
    import torch
    import torch.distributed as dist

    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    longest = most(len(text))
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
    padded[: len(text)] = text
    every = [torch.empty_like(padded) for _ in range(size())]
    dist.all_gather(every, padded)
    return [json.loads(bytes(one.numpy())) for one in every]


def from_first(make: Callable[[], Any]) -> Any:
    """What process 0 makes, on every process, by way of JSON. A UserError there is raised everywhere."""
    if not on():
        return make()
    told = {}
    if first():
        try:
            told = {"value": make()}
        except UserError as error:
            told = {"error": str(error)}
    told = gathered(told)[0]
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Process 0 goes through the body first, the others when it is done: they find what it fetched or made."""
    if not first():
        barrier()
    yield
    if first():
        barrier()


def mesh():
    """All processes in a row, as torch's distributed tensors want to know them (a DeviceMesh)."""
    from torch.distributed.device_mesh import init_device_mesh  # here: who starts no others should not wait for it

    return init_device_mesh(_me.device_type, (_me.size,))


# --- tensors ---------------------------------------------------------------------------------------------------------


def whole(parts: "tuple[Tensor, ...]", rows: list[int], total: int) -> "tuple[Tensor, ...]":
    """Tensors (total, ...) on every process, from each one's own rows of them: parts (len(rows), ...), perhaps none.

    A row is of one process; the others add 0 to it, so nothing is rounded.
    """
    import torch.distributed as dist

    joined = []
    for part in parts:
        full = part.new_zeros(total, *part.shape[1:])
        if rows:
            full[rows] = part
        if size() > 1:
            dist.all_reduce(full)
        joined.append(full)
    return tuple(joined)


def total(tensor: "Tensor") -> "Tensor":
    """The sum over the processes."""
    if size() == 1:
        return tensor
    import torch.distributed as dist

    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def summed(metrics: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Sums over the processes of fp32 numbers that add up, () each: one message for all of them."""
    if size() == 1:
        return metrics
    import torch

    return dict(zip(metrics, total(torch.stack(list(metrics.values()))).unbind(), strict=True))


# --- the end ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Whatever ends a run inside is said by one process, and ends all of them. Without torchrun nothing changes.

    The process that knows the reason says it. One that another process has left waits LINGER seconds for that; where
    nothing is said (SIGKILL, no memory), one of those left says that, with how to go on.
    """
    if not launched():
        yield
        return
    errors.may_speak = _may_speak
    stdout = sys.stdout
    if os.environ["RANK"] != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # process 0 owns the console
    status = 0
    try:
        yield
    except SystemExit as stop:  # said by one_sentence, by this process or by another
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if status:
            _hear_no_more()
            alone = _me is None and os.environ["RANK"] == "0"
            time.sleep(0 if _said or alone else LINGER)  # the end of the first one ends all: not before it has spoken
    except BaseException as error:
        status = 1
        _hear_no_more()
        if left_alone(error):
            deadline = time.monotonic() + LINGER
            while time.monotonic() < deadline and not _spoken():
                time.sleep(0.05)
            if _may_speak():
                reason = "another process of this run is gone (killed, or out of memory): all have stopped"
                print(f"error: {reason}{way_on()}", file=sys.stderr, flush=True)
        elif _may_speak():
            traceback.print_exc()
            number = os.environ["RANK"]
            print(f"error: process {number} failed, and all have stopped{way_on()}", file=sys.stderr, flush=True)
    finally:
        sys.stdout = stdout
        errors.may_speak = lambda: True
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # Not by way of destructors: after an error they wait for processes that are gone, and after none they abort half of
    # the runs of PPO, when all is saved, over a thread that torch 2.13 leaves behind ("terminate called").
    os._exit(status)


def _stop_at_once(number: int, frame) -> None:
    """Outside of what signals.py handles. torchrun sends SIGTERM to all that are left when one has failed."""
    raise Stopped(number, f"stopped by {signal_name(number)} at once{way_on()}")


def _hear_no_more() -> None:
    """This process is about to end by itself: torchrun's SIGTERM must not keep it from saying why."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


_said = False  # by this process


def _may_speak() -> bool:
    """Whether this process is the first that has something to say."""
    global _said
    if _said or _me is None:
        return _said or os.environ["RANK"] == "0"
    try:
        _said = _me.store.add("spoken", 1) == 1
    except RuntimeError:  # torchrun itself is gone (torch's DistError is one)
        _said = _me.rank == 0
    return _said


def _spoken() -> bool:
    try:
        return _me is not None and _me.store.add("spoken", 0) > 0
    except RuntimeError:
        return False


def left_alone(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    lost = r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Socket"
    # torch's own class for it (DistError) is a RuntimeError, and gloo raises plain ones
    return isinstance(error, RuntimeError) and ("Dist" in type(error).__name__ or bool(re.search(lost, str(error))))
