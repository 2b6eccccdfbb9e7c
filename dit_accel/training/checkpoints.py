"""Checkpoints of a training: what changes, written aside and renamed, from which it goes on with the same numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..files import write_text
from ..tensor_files import write_tensors, writing
from .curves import Curves
from .identity import RunIdentity
from .trainables import Trainables, copy_values

FOLDER, TRAINED_FILE, PROGRESS = "checkpoints", "trained.safetensors", "progress.json"


class Checkpoints:
    """Checkpoints in an output folder, by accelerate.

    Args:
        accelerator: of the training, prepared.
        run: what a training that goes on must share with this one.
        keep: the newest ones that stay.
        sharded: whether parameters are in shards, which accelerate then saves itself.
    """

    def __init__(
        self, output: Path, accelerator: Any, trainables: Trainables, run: RunIdentity, keep: int, sharded: bool
    ) -> None:
        self.output, self.accelerator, self.trainables = output, accelerator, trainables
        self.run, self.keep, self.sharded = run, keep, sharded
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)

    def save(self, step: int, curves: Curves) -> None:
        """Write the state after ``step`` steps, and drop the oldest checkpoints.

        Raises:
            ValueError: it cannot be written; no part of it is left.
        """
        folder = self.output / FOLDER / f"step-{step:07d}"
        # Written aside and renamed, so that a crash leaves no half checkpoint to resume from.
        aside = folder.with_name(f".{folder.name}")
        if self.accelerator.is_main_process:
            for half in folder.parent.glob(".step-*"):
                shutil.rmtree(half, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(folder):
                self.accelerator.save_state(str(aside))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    progress = {"step": step, **vars(self.run), "curves": curves.to_dict()}
                    write_text(aside / PROGRESS, json.dumps(progress))
                    shutil.rmtree(folder, ignore_errors=True)
                    aside.rename(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if self.accelerator.is_main_process:
            for old in all_checkpoints(self.output)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self) -> tuple[int, Curves] | None:
        """Steps done and curves of the newest checkpoint, whose state is loaded; None without one.

        Raises:
            ValueError: it is of another training, or cannot be read.
        """
        found = find_checkpoint(self.output, self.run)
        if found is None:
            return None
        folder, progress = found
        try:
            self.accelerator.load_state(str(folder))
        except Exception as error:  # accelerate, torch and pickle raise whatever they like for a broken file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"The checkpoint {folder} cannot be read: {reason[0]}") from error
        return int(progress["step"]), Curves.from_dict(progress["curves"])

    def _save_trained(self, _models: list[Any], weights: list[Any], folder: str) -> None:
        """Accelerate would write the whole model; only what is trained changes."""
        if self.sharded:
            return
        weights.clear()
        if self.accelerator.is_main_process:
            write_tensors(Path(folder) / TRAINED_FILE, self.trainables.named())

    def _load_trained(self, models: list[Any], folder: str) -> None:
        from safetensors.torch import load_file

        if self.sharded:
            return
        models.clear()
        copy_values(self.trainables.named(), load_file(Path(folder) / TRAINED_FILE))


def all_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints of an output folder, the oldest first."""
    return sorted(folder for folder in (output / FOLDER).glob("step-*") if (folder / PROGRESS).is_file())


def newest_checkpoint(output: Path) -> Path | None:
    """The last whole checkpoint of an output folder; None if there is none."""
    return next(iter(reversed(all_checkpoints(output))), None)


def find_checkpoint(output: Path, run: RunIdentity) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of an output folder and its progress, for a training that goes on; None if there is none.

    Raises:
        ValueError: it is of another training, has more steps than that, or cannot be read.
    """
    folder = newest_checkpoint(output)
    if folder is None:
        return None
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        step, steps = int(progress["step"]), run.config["steps"]
        difference = run.difference(progress)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} does not say which training it is of ({PROGRESS}: {type(error).__name__} {error}); give another "
            "folder (--out), or begin anew without --resume."
        ) from error
    if difference is not None:
        raise ValueError(
            f"{folder} was trained {difference}; go on with the same, give another folder (--out), or begin anew "
            "without --resume."
        )
    if step > steps:
        raise ValueError(f"{folder} has {step} steps done, got steps = {steps}; ask for more, or begin anew.")
    return folder, progress
