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
# Which kinds are refused, of models that do not take them all.
STREAMS_JOIN = ("first_block", "energy")
REFUSED: dict[str, tuple[str, ...]] = {
    # Blocks that pass more than two streams on, or whose latents change between them.
    **dict.fromkeys(
        ("ltx2", "kandinsky6", "motif", "consisid", "wan-animate", "hunyuan-dit", "qwen-image-2.1"), tuple(KINDS)
    ),
    # Lists of blocks of other names, or of one block in these tiny models.
    **dict.fromkeys(("flux3", "hidream", "joy-image", "joy-image-plus", "aura-flow"), tuple(KINDS)),
    **dict.fromkeys(("flux2", "chroma", "bria-fibo"), STREAMS_JOIN),
    **dict.fromkeys(("kandinsky5", "z-image", "bria-fibo2", "bria-fibo2-batch", "ernie-image"), ("first_block",)),
    # Blocks that call their streams otherwise.
    "cosmos3": ("first_block", "magnitude"),
    "mochi": ("first_block", "forecast", "energy"),
}
# They show SeaCache no latents, and say so when they run.
WITHOUT_LATENTS = ("z-image", "minimax-h3", "cosmos3")


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
    if kind in REFUSED.get(name, ()):
        why = "cannot skip blocks of|at least two blocks|finds no latents|no stream of the prompt"
        with pytest.raises(ValueError, match=why):
            dit_accel.patch(loop, Recipe(reuse=KINDS[kind]))
        assert torch.equal(tiny.run(loop.transformer), plain)
        return
    with dit_accel.patch(loop, Recipe(reuse=KINDS[kind])) as handle:
        outputs = loop(tiny, STEPS)
        summary = handle.summary()
    assert summary.computed_forwards + summary.skipped_forwards == STEPS
    if kind == "energy" and name in WITHOUT_LATENTS:
        assert any("does not know where this model's are" in note for note in summary.notes)
    else:
        assert summary.skipped_forwards >= 1
        assert not summary.notes
    for output in outputs:
        assert (output - plain).abs().max() <= tiny.tolerance * plain.abs().max()
    assert torch.equal(tiny.run(loop.transformer), plain)
