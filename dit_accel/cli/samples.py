"""Which samples a fine-tuning has: ready ones, clips, or what the model itself generates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import read_prompts
from .settings import Asked

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
    settings: Asked
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
            "--generate-steps": self.settings.steps,
            "--guidance": self.settings.guidance,
        }
        if self.data is not None:
            options |= {
                "--size": self.settings.width,
                "--frames": self.settings.frames,
                "--start-over": self.start_over or None,
            }
        names = [name for name, value in options.items() if value is not None]
        source = "--clips" if self.data is None else "--data"
        return f"{source} brings its own samples: {', '.join(names)} will not be used." if names else None

    def check(self) -> tuple[LatentFolder | None, list[str]]:
        """What can be read before the model is loaded: ready samples, or prompts for new ones.

        Raises:
            ValueError: a folder or file that is not there or holds nothing of use.
        """
        from ..quality.prompts import DEFAULT_PROMPTS
        from ..training.clips import find_clips
        from ..training.samples import LatentFolder

        if self.data is not None:
            return LatentFolder(self.data), []
        if self.clips is not None:
            find_clips(self.clips)
            return None, []
        prompts = read_prompts(None, self.prompts_file) or DEFAULT_PROMPTS
        return None, [prompts[i % len(prompts)] for i in range(self.count or COUNT)]

    def make(
        self,
        pipe: Any,
        builtin: Builtin | None,
        prompts: list[str],
        folder: Path,
        seed: int,
        progress: Callable[[int, int], None] | None,
        unconditional: bool = False,
    ) -> list[Skipped]:
        """Encode the clips, or generate a sample from each prompt; what is in the folder already is kept.

        Args:
            unconditional: also keep what the model is given without the prompt.

        Returns:
            Clips that were left out.
        """
        from ..pipelines.generate import call_arguments
        from ..training.data import encode_clips, generate_samples

        settings = self.settings.settings(pipe, builtin)
        if self.clips is None:
            generate_samples(
                pipe,
                prompts,
                folder,
                settings=call_arguments(pipe, **settings),
                seed=seed,
                progress=progress,
                start_over=self.start_over,
                unconditional=unconditional,
            )
            return []
        size = {name: settings[name] for name in ("width", "height", "frames") if settings.get(name) is not None}
        if len(size) < 3:
            raise ValueError("--clips needs --size and --frames for this model.")
        return encode_clips(
            pipe,
            self.clips,
            folder,
            **size,
            progress=progress,
            start_over=self.start_over,
            unconditional=unconditional,
        )
