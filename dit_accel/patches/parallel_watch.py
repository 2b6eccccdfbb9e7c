"""A process that fails in a forward that several share tells the others, which would wait for it for ever.

What waits is an exchange, below Python: gloo's ends when the process is gone, NCCL's may hang until its watchdog's
timeout. So each process has a thread that looks into the store of the process group while a shared forward runs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch.distributed as dist

logger = logging.getLogger("dit_accel")

# Seconds between two looks.
_PAUSE = 0.5
# A process that failed may hold the store: it stays until the others have read, so long at most.
_LINGER = 10.0
# An exchange that nothing ends is ended with its process.
_LAST_RESORT = 30.0


class OtherRankFailed(RuntimeError):
    """Another process failed in the forward that this one shares with it."""


class Watch:
    """This process' eye on the others.

    Args:
        name: the same in all of them: which model.
    """

    def __init__(self, name: str) -> None:
        c10d: Any = dist.distributed_c10d
        self._store: Any = c10d.PrefixStore(f"dit_accel/{name}", c10d._get_default_store())
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._forwards = 0
        self._key: str | None = None
        self._failure: str | None = None
        self._closed = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._look, name="dit_accel-watch", daemon=True)
        self._thread.start()

    @property
    def watching(self) -> bool:
        """Whether a shared forward is under way."""
        return self._key is not None

    def enter(self) -> None:
        """A shared forward has begun."""
        self._failure = None
        self._key = f"{self._forwards}"
        self._forwards += 1
        self._woken.set()

    def leave(self, error: BaseException | None) -> None:
        """It has ended, by an error or as it should; an error of this process is told to the others.

        One that an exchange outside attention raised, since another process failed, gets a note that says so.
        """
        explained = error
        if error is not None and self._key is not None and not isinstance(error, OtherRankFailed):
            explained = self.explained(error)
        key, self._key = self._key, None
        self._woken.clear()
        # Python 3.11 has notes; it was logged in any case.
        if error is not None and explained is not error and hasattr(error, "add_note"):
            error.add_note(str(explained))
        if key is None or error is None or isinstance(explained, OtherRankFailed):
            return
        try:
            self._store.set(f"{key}/failed", f"rank {self._rank} failed with {type(error).__name__}: {error}")
            begin = time.monotonic()
            while self._store.add(f"{key}/read", 0) < self._world - 1 and time.monotonic() - begin < _LINGER:
                time.sleep(_PAUSE / 5)
        except RuntimeError:  # the store is gone with the process that held it
            logger.debug("The other processes could not be told of a failure.", exc_info=True)

    def close(self) -> None:
        """Look no more."""
        self._key, self._closed = None, True
        self._woken.set()

    def explained(self, error: BaseException) -> BaseException:
        """What to raise in place of an exchange's error: the failure of another process, where there was one.

        An error of another kind is this process' own, and stays.
        """
        if not isinstance(error, RuntimeError):
            return error
        begin = time.monotonic()
        # A closed connection is seen before the next look.
        while self._failure is None and time.monotonic() - begin < 3 * _PAUSE:
            time.sleep(_PAUSE / 5)
        return error if self._failure is None else OtherRankFailed(self._failure)

    def _look(self) -> None:
        while True:
            self._woken.wait()
            if self._closed:
                return
            key = self._key
            try:
                if key is not None and self._failure is None and self._store.check([f"{key}/failed"]):
                    self._found(key, self._store.get(f"{key}/failed").decode())
            except RuntimeError:
                return  # the store is gone
            time.sleep(_PAUSE)

    def _found(self, key: str, failure: str) -> None:
        if self._key != key:
            return
        self._failure = f"Another process ended this forward: {failure}"
        self._store.add(f"{key}/read", 1)
        logger.error(self._failure)
        _abort()
        begin = time.monotonic()
        while self._key == key:
            if time.monotonic() - begin > _LAST_RESORT:
                logger.critical("%s This process still waits for it, and ends.", failure)
                os._exit(1)
            time.sleep(_PAUSE)


def _abort() -> None:
    """End NCCL's exchanges; gloo's end when the process at the other end is gone."""
    abort: Any = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None and "nccl" in dist.get_backend():
        abort()
