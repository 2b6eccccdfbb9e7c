"""What a command measures on: prompts, sizes, dtype and device, read before a model is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import read_device, read_dtype, read_prompts
from .settings import Asked

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Opened:
    """A pipeline at hand.

    Attributes:
        name: of the model.
        arguments: of each call of ``pipe``.
        prompts: at least one.
    """

    name: str
    pipe: Any
    arguments: dict[str, Any]
    prompts: list[str]


@dataclass(frozen=True)
class Workload:
    """What `calibrate`, `search` and `tune` run a pipeline on."""

    asked: Asked
    prompts: list[str]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def read(
        cls,
        prompt: Sequence[str] | None,
        prompts_file: Path | None,
        asked: Asked,
        device: str | None,
        dtype: str | None,
    ) -> Workload:
        """Check all that no model is needed for.

        Raises:
            ValueError: prompts that cannot be read, a device that is not there, or an unknown dtype.
        """
        prompts, where = read_prompts(prompt, prompts_file), read_device(device)
        return cls(asked, prompts, where, read_dtype(dtype, where))

    def open(self, model: str | None, quiet: bool) -> Opened:
        """Load the model; without prompts two of the default ones are taken.

        Raises:
            ValueError: no such model, or a size that it does not make.
        """
        from ..pipelines.generate import call_arguments
        from ..quality.prompts import DEFAULT_PROMPTS
        from .model import open_model

        name, builtin, pipe = open_model(model, self.dtype, self.device, quiet=quiet)
        arguments = call_arguments(pipe, **self.asked.settings(pipe, builtin))
        pipe.set_progress_bar_config(disable=True)
        return Opened(name, pipe, arguments, self.prompts or list(DEFAULT_PROMPTS[:2]))
