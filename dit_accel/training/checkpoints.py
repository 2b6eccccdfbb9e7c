"""Checkpoints of a training: what changes, written aside and renamed, from which it goes on with the same numbers."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import FinetuneConfig
from .curves import Curves
from .trainables import Trainables, copy_values

FOLDER, TRAINED_FILE, PROGRESS = "checkpoints", "trained.safetensors", "progress.json"
# What a training that goes on may have otherwise.
MAY_CHANGE = ("steps", "max_seconds", "checkpoint_every", "evaluate_every", "keep_checkpoints")


class Checkpoints:
    """Checkpoints in an output folder, by accelerate.

    Args:
        accelerator: of the training, prepared.
        sharded: whether parameters are in shards, which accelerate then saves itself.
    """

    def __init__(
        self, output: Path, accelerator: Any, trainables: Trainables, config: FinetuneConfig, sharded: bool
    ) -> None:
        self.output, self.accelerator, self.trainables = output, accelerator, trainables
        self.config, self.sharded = config, sharded
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, curves: Curves) -> None:
        """Write the state after ``step`` steps, and drop the oldest checkpoints."""
        folder = self.output / FOLDER / f"step-{step:07d}"
        # Written aside and renamed, so that a crash leaves no half checkpoint to resume from.
        aside = folder.with_name(f".{folder.name}")
        self.accelerator.save_state(str(aside))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {"step": step, "config": asdict(self.config), "curves": curves.to_dict()}
            (aside / PROGRESS).write_text(json.dumps(progress))
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
            for old in self.all()[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> tuple[int, Curves] | None:
        """Steps done and curves of the newest checkpoint, whose state is loaded; None without one.

        Raises:
            ValueError: it was trained with other settings.
        """
        folder = self.newest()
        if folder is None:
            return None
        progress = json.loads((folder / PROGRESS).read_text())
        mine = json.loads(json.dumps(asdict(self.config)))
        for name, value in mine.items():
            theirs = progress["config"].get(name)
            if name not in MAY_CHANGE and theirs != value:
                raise ValueError(f"{folder} was trained with {name} = {theirs!r}, got {value!r}.")
        self.accelerator.load_state(str(folder))
        return int(progress["step"]), Curves.from_dict(progress["curves"])

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        return sorted(folder for folder in (self.output / FOLDER).glob("step-*") if (folder / PROGRESS).is_file())

    def newest(self) -> Path | None:
        """The last whole checkpoint."""
        return next(iter(reversed(self.all())), None)

    def _save_trained(self, models: list[Any], weights: list[Any], folder: str) -> None:
        """Accelerate would write the whole model; only what is trained changes."""
        from safetensors.torch import save_file

        if self.sharded:
            return
        weights.clear()
        if self.accelerator.is_main_process:
            Path(folder).mkdir(parents=True, exist_ok=True)
            values = {n: p.detach().cpu().contiguous() for n, p in self.trainables.named().items()}
            save_file(values, Path(folder) / TRAINED_FILE)

    def _load_trained(self, models: list[Any], folder: str) -> None:
        from safetensors.torch import load_file

        if self.sharded:
            return
        models.clear()
        copy_values(self.trainables.named(), load_file(Path(folder) / TRAINED_FILE))
