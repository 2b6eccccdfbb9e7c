"""What makes two trainings one: a checkpoint goes on only with the recipe, settings, model and samples of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..patches.targets import self_attentions, transformers_of
from ..plain_data import as_plain, digest, first_difference
from ..recipe import Recipe
from .batches import Samples
from .config import FinetuneConfig
from .model_facts import model_difference, model_facts
from .noise import sigma_shift
from .samples import refuse_mixed

# What a training that goes on may have otherwise: none of it changes what is learned.
MAY_CHANGE = (
    "steps",
    "max_seconds",
    "checkpoint_every",
    "evaluate_every",
    "keep_checkpoints",
    "gradient_checkpointing",
    "adapter_dtype",
)
# Only their product with the number of processes counts.
SHARED_OUT = ("batch_size", "accumulation")
LOOKED_AT = 64


@dataclass(frozen=True)
class RunIdentity:
    """A training as plain data.

    Attributes:
        recipe: as ``Recipe.to_dict`` gives it.
        config: all fields of the :class:`~dit_accel.training.config.FinetuneConfig`.
        model: facts of the transformer before the training.
        measures: dtype of the transformer, and shift of the noise levels.
        samples_a_step: processes x batch_size x accumulation; None where that is not known yet.
        data: number of samples and a digest of them; None where that is not known yet.
    """

    recipe: Mapping[str, Any]
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    measures: Mapping[str, Any]
    samples_a_step: int | None = None
    data: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, pipe: Any, recipe: Recipe, config: FinetuneConfig) -> RunIdentity:
        """Of a training that has not begun."""
        model, attentions = next(
            (model, dict(self_attentions(model, family)))
            for name, model, family in transformers_of(pipe)
            if name == config.transformer
        )
        return cls(
            recipe=as_plain(recipe.to_dict()),
            config=as_plain(asdict(config)),
            model=model_facts(model, attentions),
            measures={"dtype": str(getattr(model, "dtype", None)), "shift": sigma_shift(pipe, config.shift)},
        )

    def on(self, data: Mapping[str, Any], processes: int) -> RunIdentity:
        """The same with its data (:func:`survey`) and processes known."""
        batch: int = self.config["batch_size"] * self.config["accumulation"]
        return replace(self, data=data, samples_a_step=processes * batch)

    def difference(self, there: Mapping[str, Any]) -> str | None:
        """How another training (its ``vars``) differs, in words that go on from "was trained"; None if it does not."""
        free = (*MAY_CHANGE, *SHARED_OUT)
        was, now = ({k: v for k, v in side.items() if k not in free} for side in (there["config"], self.config))
        difference = (
            first_difference(there["recipe"], self.recipe)
            or first_difference(was, now)
            or first_difference(there["measures"], self.measures)
            or model_difference(self.config["transformer"], there["model"], self.model)
        )
        if difference is not None:
            return f"with {difference}"
        if self.samples_a_step is not None and there["samples_a_step"] != self.samples_a_step:
            return (
                f"with {there['samples_a_step']} samples a step (processes x batch_size x accumulation), "
                f"got {self.samples_a_step}"
            )
        if self.data is not None and there["data"] != self.data:
            before, given = there["data"]["samples"], self.data["samples"]
            return (
                f"on {before} samples, got {given}" if before != given else f"on other samples than the {given} given"
            )
        return None


def survey(data: Samples, batch_size: int) -> dict[str, Any]:
    """Number of samples, and a digest of what they hold. Of more than 64 as many are read, evenly spread.

    Raises:
        ValueError: no samples, or samples of different sizes that cannot make a batch.
    """
    count = len(data)
    if count == 0:
        raise ValueError("There is no sample to train on: the data are empty.")
    looked_at = min(count, LOOKED_AT)
    first, digests = data[0], []
    for number in range(looked_at):
        sample = data[number * count // looked_at]
        if batch_size > 1:
            refuse_mixed([first, sample])
        digests.append(digest(sample.latents, sample.timestep_scale, sample.condition))
    return {"samples": count, "digest": digest(*digests)}
