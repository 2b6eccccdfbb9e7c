"""TensorBoard curves of a training, through accelerate; nothing where TensorBoard is not installed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..tensor_files import writing

FOLDER = "tensorboard"


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed."""
    return find_spec("tensorboard") is not None


class Tracking:
    """Event files in a folder of the output folder.

    Every method raises a ``ValueError`` where they cannot be written.
    """

    def __init__(self, accelerator: Any, output: Path) -> None:
        self.accelerator, self.folder = accelerator, output / FOLDER
        self._before = threading.excepthook

    def open(self) -> None:
        """Begin to write."""
        threading.excepthook = self._excepthook
        if self.accelerator.log_with:
            with writing(self.folder):
                self.accelerator.init_trackers(FOLDER)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add one point to each curve."""
        with writing(self.folder):
            self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        """End accelerate's trackers and process group."""
        try:
            with writing(self.folder):
                self.accelerator.end_training()
        finally:
            if threading.excepthook == self._excepthook:
                threading.excepthook = self._before

    def _excepthook(self, error: Any) -> None:
        # The event writer's thread would print a traceback of what the next call raises again.
        if type(error.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            self._before(error)
