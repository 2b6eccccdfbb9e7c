"""What a tuning has run so far, in its folder: written whole after every run, and gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..files import write_text
from ..plain_data import as_plain, first_difference
from ..quality.measurement import number_from_json, number_to_json
from ..recipe import Recipe
from ..tensor_files import write_tensors
from .lists import Trajectory
from .time_model import RunSeconds

FILE, DENSE_FOLDER = "state.json", "dense"
ANEW = "Give another folder (--out), or start over (--start-over)."


@dataclass(frozen=True)
class Outcome:
    """What one run under a recipe lost and took.

    Attributes:
        seconds: of its parts.
        metrics: values to dense by name.
        notes: of the patch's summary.
    """

    seconds: RunSeconds
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class State:
    """All runs of a tuning, by prompt.

    Attributes:
        folder: where it is kept; None for memory alone.
        asked: what the runs depend on.
        dense: seconds of the dense runs, and trajectories.
        runs: outcomes by recipe, one for each prompt that was run.
        verified: recipes that were run for a target, by its text.
        frames: of the dense runs, uint8 ``[F, H, W, 3]``.
    """

    folder: Path | None
    asked: dict[str, Any]
    dense: list[tuple[RunSeconds, Trajectory]] = field(default_factory=list)
    runs: dict[Recipe, list[Outcome]] = field(default_factory=dict)
    verified: dict[str, list[Recipe]] = field(default_factory=dict)
    frames: dict[int, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, folder: Path | None, asked: Mapping[str, Any], start_over: bool) -> State:
        """An empty state, or what a folder holds of the same tuning.

        Raises:
            ValueError: the folder holds another tuning, or a damaged one.
        """
        state = cls(folder, as_plain(asked))
        if folder is None or start_over or not (folder / FILE).exists():
            return state
        path = folder / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            there = data["asked"]
            if not isinstance(there, dict):
                raise TypeError("what was asked is no object")
            difference = first_difference(there, state.asked)
            if difference is None:
                state._restore(data)
        except (KeyError, TypeError, ValueError, OSError, AttributeError, RecursionError) as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise ValueError(f"{path} is the damaged state of a tuning ({reason}). {ANEW}") from error
        if difference is not None:
            raise ValueError(f"{path} is of another tuning: {difference}. {ANEW}")
        return state

    def add_dense(self, frames: torch.Tensor, seconds: RunSeconds, trajectory: Trajectory) -> None:
        """The dense run of the next prompt."""
        number = len(self.dense)
        if self.folder is None:
            self.frames[number] = frames
        else:
            write_tensors(self._clip(number), {"frames": frames})
        self.dense.append((seconds, trajectory))
        self.save()

    def add(self, recipe: Recipe, outcome: Outcome) -> None:
        """A run of a recipe with the next prompt."""
        self.runs.setdefault(recipe, []).append(outcome)
        self.save()

    def dense_frames(self, number: int) -> torch.Tensor:
        """The dense clip of a prompt, uint8 ``[F, H, W, 3]``.

        Raises:
            ValueError: its file is damaged.
        """
        if self.folder is None:
            return self.frames[number]
        path = self._clip(number)
        try:
            return load_file(path)["frames"]
        except (SafetensorError, KeyError, OSError) as error:
            raise ValueError(f"{path} holds no dense clip ({str(error).strip().rstrip('.')}). {ANEW}") from error

    def save(self) -> None:
        """Write all of it.

        Raises:
            ValueError: the file cannot be written.
        """
        if self.folder is None:
            return
        dense = [{**asdict(seconds), "gram": one.gram.tolist()} for seconds, one in self.dense]
        runs = [
            {"recipe": recipe.to_dict(), "clips": [_outcome_to_json(one) for one in outcomes]}
            for recipe, outcomes in self.runs.items()
        ]
        verified = {target: [recipe.to_dict() for recipe in recipes] for target, recipes in self.verified.items()}
        data = {"asked": self.asked, "dense": dense, "runs": runs, "verified": verified}
        write_text(self.folder / FILE, json.dumps(data) + "\n")

    def _restore(self, data: Mapping[str, Any]) -> None:
        for one in data["dense"]:
            trajectory = Trajectory(np.asarray(one["gram"], np.float64))
            if trajectory.gram.shape != (len(one["steps"]),) * 2:
                raise ValueError("its steps are not those of its trajectories")
            self.dense.append((RunSeconds(tuple(one["steps"]), float(one["rest"])), trajectory))
        for one in data["runs"]:
            self.runs[Recipe.from_dict(one["recipe"])] = [_outcome_from_json(clip) for clip in one["clips"]]
        for target, recipes in data["verified"].items():
            self.verified[target] = list(map(Recipe.from_dict, recipes))

    def _clip(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / DENSE_FOLDER / f"{number}.safetensors"


def _outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    metrics = {name: number_to_json(value) for name, value in outcome.metrics.items()}
    return {**asdict(outcome.seconds), "metrics": metrics, "notes": list(outcome.notes)}


def _outcome_from_json(data: Mapping[str, Any]) -> Outcome:
    metrics = {name: number_from_json(value) for name, value in data["metrics"].items()}
    return Outcome(RunSeconds(tuple(data["steps"]), float(data["rest"])), metrics, tuple(data["notes"]))
