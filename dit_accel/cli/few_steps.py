"""To how many steps a fine-tuning distils, and of which teacher."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .settings import Asked

if TYPE_CHECKING:
    from ..pipelines.builtin import Builtin
    from ..training.few_steps import FewStepConfig


@dataclass(frozen=True)
class FewStepsAsked:
    """What the options say; a guidance of None is the model's own."""

    steps: int
    teacher_steps: int
    guidance: float | None

    def check(self) -> FewStepConfig:
        """What no model is needed for.

        Raises:
            ValueError: more steps than the teacher has, or a guidance below 1.
        """
        from ..training.few_steps import FewStepConfig

        return FewStepConfig(self.steps, self.teacher_steps, 1.0 if self.guidance is None else self.guidance)

    def config(self, pipe: Any, builtin: Builtin | None, asked: Asked) -> FewStepConfig:
        """With the guidance of the samples, or the model's own, where none was named; a model that takes guidance as a
        number has no second forward to be spared."""
        if self.guidance is not None or getattr(pipe.transformer.config, "guidance_embeds", False):
            return self.check()
        takes = inspect.signature(type(pipe).__call__).parameters
        own = next((takes[name].default for name in ("true_cfg_scale", "guidance_scale") if name in takes), 1.0)
        scale = asked.guidance or (own if builtin is None else builtin.settings.guidance)
        return replace(self.check(), guidance=max(1.0, float(scale)))
