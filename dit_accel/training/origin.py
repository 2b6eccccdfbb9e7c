"""What made the samples of a folder: samples of other settings are never taken for one's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from ..patches.targets import self_attentions, transformers_of
from ..plain_data import as_plain, first_difference
from .earlier import set_aside
from .model_facts import model_difference, model_facts
from .samples import sample_files

RECORD = "samples.json"


@dataclass(frozen=True)
class Origin:
    """What made the samples of a folder, as plain data.

    Attributes:
        models: facts of every transformer of the pipeline, by name; and what the scheduler is set to.
        settings: what all samples share.
        samples: what each sample was made from, by its name.
    """

    models: Mapping[str, Any]
    settings: Mapping[str, Any]
    samples: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any, settings: Mapping[str, Any], samples: Mapping[str, Any]) -> Origin:
        """Of samples that a pipeline makes."""
        found = transformers_of(pipe)
        models: dict[str, Any] = {
            name: model_facts(model, dict(self_attentions(model, family))) for name, model, family in found
        }
        config = {k: v for k, v in dict(getattr(pipe.scheduler, "config", {})).items() if not k.startswith("_")}
        models["scheduler"] = {"class": type(pipe.scheduler).__name__, "config": config}
        own = {"pipeline": type(pipe).__name__, "dtype": str(getattr(found[0][1], "dtype", None))}
        return cls(as_plain(models), as_plain({**own, **settings}), as_plain(samples))

    def claim(self, folder: Path, start_over: bool = False) -> None:
        """Keep this in the folder (``samples.json``), before samples are made there.

        Samples that are there already must have the same origin; some of them may still be missing.

        Args:
            start_over: move samples of another origin to a folder ``earlier-1`` in this one instead of raising.

        Raises:
            ValueError: there are samples of another origin; the message names what differs.
        """
        present = {path.stem for path in sample_files(folder)}
        there = self._read(folder)
        if present and (difference := self._difference(there, present)) is not None:
            if not start_over:
                raise ValueError(
                    f"{folder} holds samples {difference}; give another folder (--out), or start over (--start-over)."
                )
            set_aside(folder, [RECORD, *(path.name for path in sample_files(folder))])
        mine = {"models": self.models, "settings": self.settings, "samples": self.samples}
        if self._read(folder) != mine:
            write_text(folder / RECORD, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")

    def _difference(self, there: Mapping[str, Any] | None, present: set[str]) -> str | None:
        """In words that go on from "holds samples"."""
        if there is None:
            return f"of which no readable {RECORD} says what made them"
        if difference := first_difference(there["settings"], self.settings):
            return f"made with {difference}"
        if missing := self.models.keys() - there["models"].keys():
            return f"made by a pipeline without {min(missing)}"
        for name, model in self.models.items():
            if difference := model_difference(name, there["models"][name], model):
                return f"made with {difference}"
        made = {name: there["samples"].get(name, {}) for name in sorted(present & self.samples.keys())}
        if difference := first_difference(made, {name: self.samples[name] for name in made}):
            return f"made with {difference}"
        if more := sorted(present - self.samples.keys()):
            return f"that are not among the {len(self.samples)} asked for ({more[0]}, {len(more)} in all)"
        return None

    @staticmethod
    def _read(folder: Path) -> dict[str, Any] | None:
        """The folder's record; None if there is none that can be read."""
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        parts = ("models", "settings", "samples")
        if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in parts):
            return None
        return found if all(isinstance(model, dict) for model in found["models"].values()) else None
