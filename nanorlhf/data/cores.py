"""Pure Python on many texts, over all cores. ROUGE holds the interpreter: threads would not do."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

LEAST = 4000  # items from which it pays: a new process imports the script again, which takes seconds
CHUNK = 250


def over_cores(
    function: Callable[[list], list],
    items: Sequence,
    progress: Callable = lambda chunks, what, total=None: chunks,
    what: str = "counting",
    cores: int | None = None,
) -> list:
    """function(chunk of items) -> one result an item, for all items, in their order.

    `function` has to be importable by name (no lambda). Few items, or one core: in this process.
    """
    chunks = [list(items[i : i + CHUNK]) for i in range(0, len(items), CHUNK)]
    cores = cores or os.cpu_count() or 1
    if cores == 1 or len(items) < LEAST:
        return [result for chunk in progress(chunks, what=what) for result in function(chunk)]
    # spawn: a fork would copy the threads' locks of torch without the threads
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        done = progress(pool.map(function, chunks), what=what, total=len(chunks))
        return [result for chunk in done for result in chunk]
