"""Which samples a fine-tuning has: ready ones, clips, or what the model itself generates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pipelines.builtin import Builtin
    from ..training.samples import LatentFolder, Skipped

COUNT = 64


@dataclass(frozen=True)
class SamplesAsked:
    """What the options say about samples; None where they say nothing."""

    data: Path | None
    clips: Path | None
    prompts_file: Path | None
    count: int | None
    size: tuple[int, int] | None
    frames: int | None
    steps: int | None
    guidance: float | None
    start_over: bool

    def __post_init__(self) -> None:
        if self.data is not None and self.clips is not None:
            raise ValueError("Give --data or --clips, not both.")

    def unused(self) -> str | None:
        """Options that say nothing about these samples, in a sentence; None if there are none."""
        if self.data is None and self.clips is None:
            return None
        options: dict[str, Any] = {
            "--prompts-file": self.prompts_file,
            "--count": self.count,
            "--generate-steps": self.steps,
            "--guidance": self.guidance,
        }
        if self.data is not None:
            options |= {"--size": self.size, "--frames": self.frames, "--start-over": self.start_over or None}
        names = [name for name, value in options.items() if value is not None]
        source = "--clips" if self.data is None else "--data"
        return f"{source} brings its own samples: {', '.join(names)} will not be used." if names else None

    def check(self) -> tuple[LatentFolder | None, list[str]]:
        """What can be read before the model is loaded: ready samples, or prompts for new ones.

        Raises:
            ValueError: a folder or file that is not there or holds nothing of use.
        """
        from ..training.clips import find_clips
        from ..training.samples import LatentFolder

        if self.data is not None:
            return LatentFolder(self.data), []
        if self.clips is not None:
            find_clips(self.clips)
            return None, []
        prompts = self._prompts()
        return None, [prompts[i % len(prompts)] for i in range(self.count or COUNT)]

    def make(
        self,
        pipe: Any,
        builtin: Builtin | None,
        prompts: list[str],
        folder: Path,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> list[Skipped]:
        """Encode the clips, or generate a sample from each prompt; what is in the folder already is kept.

        Returns:
            Clips that were left out.
        """
        from ..pipelines.generate import call_arguments
        from ..pipelines.sizes import fitted_frames, refuse_size
        from ..training.data import encode_clips, generate_samples

        defaults = vars(builtin.settings) if builtin else {}
        width, height = self.size or (defaults.get("width"), defaults.get("height"))
        frames = defaults.get("frames")
        refuse_size(pipe, *(self.size or (None, None)))
        if self.frames is not None:
            frames = fitted_frames(pipe, self.frames)
            if frames != self.frames:
                print(f"{type(pipe).__name__} makes {frames} frames, not {self.frames}.", file=sys.stderr)
        if self.clips is not None:
            if width is None or height is None or frames is None:
                raise ValueError("--clips needs --size and --frames for this model.")
            return encode_clips(
                pipe,
                self.clips,
                folder,
                width=width,
                height=height,
                frames=frames,
                progress=progress,
                start_over=self.start_over,
            )
        settings = call_arguments(
            pipe,
            width=width,
            height=height,
            frames=frames,
            steps=self.steps or defaults.get("steps"),
            guidance=self.guidance if self.guidance is not None else defaults.get("guidance"),
        )
        generate_samples(
            pipe, prompts, folder, settings=settings, seed=seed, progress=progress, start_over=self.start_over
        )
        return []

    def _prompts(self) -> list[str]:
        from ..quality.prompts import DEFAULT_PROMPTS

        if self.prompts_file is None:
            return list(DEFAULT_PROMPTS)
        try:
            # Editors may begin a file with a byte order mark.
            text = self.prompts_file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts-file {self.prompts_file} must be UTF-8 text: {error.reason}.") from error
        except OSError as error:
            raise ValueError(f"--prompts-file {self.prompts_file} cannot be read: {error.strerror}.") from error
        prompts = [line.strip() for line in text.split("\n") if line.strip()]
        if not prompts:
            raise ValueError(f"--prompts-file {self.prompts_file} must hold a prompt, one a line, got none.")
        return prompts
