"""How the threads of a command wait for each other on a CPU."""

from __future__ import annotations

import os
import sys

# Each says how long OpenMP's threads wait busily: the first of any OpenMP, the second of GNU's, the others of LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said how they should; for child processes too.

    By default they wait busily, at the end of every parallel region, and on a busy machine take the time of the very
    thread that they wait for. OpenMP reads this once, when torch is loaded; after that nothing is set. The library
    itself leaves the environment alone: a program that runs it on a CPU beside other work sets
    ``OMP_WAIT_POLICY=passive`` before it imports torch.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
