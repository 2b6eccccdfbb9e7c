"""Size, frames, steps and guidance of a run: what was asked for, as the model will have it."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .options import read_size

if TYPE_CHECKING:
    from ..pipelines.builtin import Builtin


@dataclass(frozen=True)
class Asked:
    """What the options say; None where they say nothing."""

    width: int | None
    height: int | None
    frames: int | None
    steps: int | None
    guidance: float | None

    @classmethod
    def read(cls, size: str | None, frames: int | None, steps: int | None, guidance: float | None = None) -> Asked:
        """Check what no model is needed for."""
        width, height = read_size(size) if size is not None else (None, None)
        if guidance is not None and not math.isfinite(guidance):
            raise ValueError(f"--guidance must be finite, got {guidance}.")
        return cls(width, height, frames, steps, guidance)

    def settings(self, pipe: Any, builtin: Builtin | None) -> dict[str, Any]:
        """Arguments of :func:`~dit_accel.pipelines.generate.generate`: the built-in model's own, or what was asked.

        Frames that the model does not make are said, on stderr.

        Raises:
            ValueError: a size, or a number of frames, that the pipeline does not make.
        """
        from ..pipelines.sizes import fitted_frames, refuse_size

        settings = dict(vars(builtin.settings)) if builtin else {}
        if "num_frames" not in inspect.signature(type(pipe).__call__).parameters:
            settings.pop("frames", None)  # another pipeline over its models, that makes as many as it is given
        settings |= {name: value for name, value in vars(self).items() if value is not None}
        refuse_size(pipe, self.width, self.height)
        if self.frames is not None:
            settings["frames"] = made = fitted_frames(pipe, self.frames)
            if made != self.frames:
                print(
                    f"{type(pipe).__name__} makes {made} frames, not the {self.frames} that --frames asks for.",
                    file=sys.stderr,
                )
        return settings
