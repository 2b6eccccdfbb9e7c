"""Every transformer class either reuses what its blocks gave, or says why it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import dit_accel
from dit_accel import Recipe
from dit_accel.stages.reuse.energy import Energy
from dit_accel.stages.reuse.first_block import FirstBlock
from dit_accel.stages.reuse.forecast import Forecast
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.reuse.magnitude import Magnitude
from dit_accel.stages.reuse.protocol import Reuse
from tests.tiny_registry import MODELS

STEPS = 4
# Each skips at least one of the four steps where nothing changes.
KINDS: dict[str, Reuse] = {
    "first_block": FirstBlock(0.5),
    "magnitude": Magnitude(1.0, 3, 0.0, (1.0,) * STEPS),
    "forecast": Forecast(interval=2, warmup=2),
    "energy": Energy(1.0),
    "listed": Listed((0, 1), STEPS),
    "listed in line": Listed((0, 1), STEPS, order=1),
}
# Models of the registry whose blocks diffusers 0.42.1 knows, with the kinds that do not follow their streams.
KNOWN: dict[str, tuple[str, ...]] = {
    "framepack": (),
    "kandinsky5": ("first_block",),
    "mochi": ("first_block", "forecast", "energy"),
    "flux2": ("first_block", "energy"),
    "hunyuan-image": (),
    "hunyuan-image-refiner": (),
    "cogview4": (),
    "pixart": (),
}


class Loop:
    """The least that a patch takes for a pipeline: it gives the same forward at every step."""

    def __init__(self, model: Any) -> None:
        self.transformer = model
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(self, tiny: Any, steps: int) -> list[torch.Tensor]:
        self.scheduler.set_timesteps(steps)
        given, found = tiny.given(), []
        for timestep in self.scheduler.timesteps:
            self._current_timestep = timestep
            found.append(tiny.run(self.transformer, given))
        return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_changes_reuse_changes_nothing(name: str, kind: str) -> None:
    tiny = MODELS[name]
    loop = Loop(tiny.build())
    plain = tiny.run(loop.transformer)
    if name not in KNOWN or kind in KNOWN[name]:
        why = "cannot skip blocks of|at least two blocks|finds no latents|no stream of the prompt"
        with pytest.raises(ValueError, match=why):
            dit_accel.patch(loop, Recipe(reuse=KINDS[kind]))
        assert torch.equal(tiny.run(loop.transformer), plain)
        return
    with dit_accel.patch(loop, Recipe(reuse=KINDS[kind])) as handle:
        outputs = loop(tiny, STEPS)
        summary = handle.summary()
    assert summary.computed_forwards + summary.skipped_forwards == STEPS
    assert summary.skipped_forwards >= 1
    assert not summary.notes
    for output in outputs:
        assert (output - plain).abs().max() <= tiny.tolerance * plain.abs().max()
    assert torch.equal(tiny.run(loop.transformer), plain)
