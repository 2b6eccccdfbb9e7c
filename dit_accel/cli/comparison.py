"""What `compare` and `verify` share: runs in turns of one model, in a folder that an interrupted run goes on with."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import PIPELINE, claimed_folder
from .settings import Asked

if TYPE_CHECKING:
    import torch

    from ..parts import Parts
    from ..pipelines.builtin import Builtin
    from ..quality.results import ComparisonReport
    from ..recipe import Recipe


@dataclass(frozen=True)
class Comparison:
    """What is compared, read before a model is loaded.

    Attributes:
        model: its name.
        recipes: by the name in the report; None for what ``patch(pipe)`` does.
        prompts, seeds: every combination is one clip.
        metrics: names; None for all.
        pictures: whether clips are saved.
        compiled: whether the transformer's blocks are, on both sides.
        graphs, linear, vae: what :func:`~dit_accel.accelerate` does beside attention, on the accelerated side alone.
    """

    model: str
    recipes: Mapping[str, Recipe | None]
    prompts: Sequence[str]
    seeds: Sequence[int]
    asked: Asked
    dtype: torch.dtype
    device: torch.device
    metrics: Sequence[str] | None
    repeat: int = 1
    pictures: bool = True
    compiled: bool = False
    graphs: bool = False
    linear: str | None = None
    vae: str | None = None

    @property
    def clips(self) -> int:
        return len(self.prompts) * len(self.seeds)

    def claim(self, out: Path | None, default: Path, start_over: bool) -> Parts:
        """The folder, claimed for these settings.

        Raises:
            ValueError: repeated prompts or seeds, an unknown metric, a video that nothing here can encode, or what
                :func:`~dit_accel.cli.output.claimed_folder` refuses.
        """
        from ..pipelines.encode import refuse_missing_encoder
        from ..quality.compare import clip_pairs
        from ..quality.metrics import find_metrics
        from ..quality.report import REPORT
        from .model import choose_model, will_make_video

        clip_pairs(self.prompts, self.seeds)
        find_metrics(self.metrics)
        if self.pictures and will_make_video(*choose_model(self.model)):
            refuse_missing_encoder()
        return claimed_folder(
            out, default, self._settings(), lambda parts: parts.count() < self.clips, REPORT, start_over
        )

    def finished(self, parts: Parts) -> ComparisonReport | None:
        """The report where all of it is made, so that no model is loaded for nothing; its page is written again."""
        from ..quality.report import REPORT, read_report, write_report

        path = parts.folder / REPORT
        if parts.count() < self.clips or not path.exists():
            return None
        report = read_report(path)
        if len(report.pairs) < self.clips:
            return None
        write_report(report, parts.folder)
        return report

    def arguments(self, pipe: Any, builtin: Builtin | None) -> dict[str, Any]:
        """Of the pipeline's call.

        Raises:
            ValueError: a setting that it does not take.
        """
        from ..pipelines.generate import call_arguments

        pipe.set_progress_bar_config(disable=True)
        return call_arguments(pipe, **self.asked.settings(pipe, builtin))

    def run(self, pipe: Any, builtin: Builtin | None, parts: Parts, **options: Any) -> ComparisonReport:
        """Make what is missing.

        Args:
            options: of :func:`~dit_accel.quality.compare.compare`.

        Raises:
            ValueError: the folder is of another model, or what ``compare`` refuses.
        """
        from ..acceleration.api import accelerate
        from ..acceleration.compiled import compile_blocks
        from ..calibration.identity import describe_pipeline
        from ..patches.said_once import said_once
        from ..pipelines.generate import frames_per_second
        from ..quality.compare import compare

        arguments = self.arguments(pipe, builtin)
        parts.claim(describe_pipeline(pipe), (), PIPELINE)
        undo = compile_blocks(pipe) if self.compiled else lambda: None
        try:
            with said_once():
                return compare(
                    pipe,
                    self.recipes,
                    self.prompts,
                    self.seeds,
                    metrics=self.metrics,
                    generate_kwargs=arguments,
                    out=parts.folder,
                    fps=frames_per_second(pipe),
                    patch=partial(accelerate, graphs=self.graphs, linear=self.linear, vae=self.vae),
                    repeat=self.repeat,
                    facts={"model": self.model, "command": " ".join(["dit-accel", *sys.argv[1:]])},
                    pictures=self.pictures,
                    parts=parts,
                    progress=lambda line: print(line, file=sys.stderr),
                    **options,
                )
        finally:
            undo()

    def _settings(self) -> dict[str, Any]:
        """All that a clip, its metrics and its seconds depend on, as far as it is known before the model is loaded."""
        from .environment import decisive

        # Left out where it is not asked for: folders of earlier versions have none of it.
        asked = {"graphs": self.graphs or None, "linear": self.linear, "vae": self.vae}
        beside = {name: value for name, value in asked.items() if value is not None}
        return {
            "model": self.model,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "settings": vars(self.asked),
            "recipes": {name: "auto" if one is None else one.to_dict() for name, one in self.recipes.items()},
            "metrics": self.metrics,
            "repeat": self.repeat,
            "pictures": self.pictures,
            "compiled": self.compiled,
            **beside,
            **decisive(self.dtype, self.device),
        }
