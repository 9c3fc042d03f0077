"""Memory that a CPU's tensors have given back stays with the process, for those of the next pass.

A learning pass makes and drops a few hundred MB of activations. glibc gives what is free at the end of its memory back
to the system, and the next pass gets it again page by page, each filled with zeros first: on 2 cores of an AMD EPYC
(Zen 4) 29,000 to 70,000 pages a pass of SFT, and a tenth of its time. So up to KEPT bytes may lie free. Results are
the same bits; the most memory that a run ever holds is the same, too.
"""

import ctypes
import os
import sys

KEPT = 256 << 20  # bytes
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's malloc.h
LARGEST = 32 << 20  # bytes: the highest threshold that glibc's manual allows; a larger tensor comes from the system


def keep_freed_memory() -> bool:
    """-> whether it does from here on: by glibc (Linux), where the environment does not set its thresholds itself."""
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = None if chosen or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)
    # The first one alone would be enough to make glibc stop adapting both, and to set the second alone would be worse
    # than nothing: each tensor above 128 KB would come from the system.
    return bool(mallopt and mallopt(MMAP_THRESHOLD, LARGEST) and mallopt(TRIM_THRESHOLD, KEPT))
