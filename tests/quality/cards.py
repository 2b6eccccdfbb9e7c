"""A card of made-up runs."""

from __future__ import annotations

from typing import Any

from dit_accel.quality.card import make_card
from dit_accel.quality.measurement import Measurement
from dit_accel.quality.ran import Ran
from dit_accel.quality.results import DENSE, ClipResult, ComparisonReport
from dit_accel.quality.sequence import Sequence
from dit_accel.quality.stages import Stages

SHAPE = (5, 48, 80)


def report() -> ComparisonReport:
    """Two clips: dense takes 10 and 12 s, ``fast`` 4 and 6 s at 30 and 40 dB, with 13 of 30 steps."""
    results = []
    for prompt, dense, fast, psnr in (("a cat", 10.0, 4.0, 30.0), ("a dog", 12.0, 6.0, 40.0)):
        for name, seconds in ((DENSE, dense), ("fast", fast)):
            stages = (Stages(0.5, seconds - 1.5, 1.0, 30),)
            if name == DENSE:
                results.append(ClipResult(prompt, 0, name, seconds, density=1.0, stages=stages, shape=SHAPE))
                continue
            metrics = {
                "psnr": Measurement(psnr),
                "ssim": Measurement(0.9),
                "lpips": Measurement(reason="LPIPS needs weights."),
                "flicker": Measurement(1.5),
            }
            ran = Ran(40, 0, {"first steps": 12}, 0.25, 26, 34, ("attention: torch (no GPU)",))
            results.append(
                ClipResult(prompt, 0, name, seconds, density=0.42, metrics=metrics, stages=stages, ran=ran, shape=SHAPE)
            )
    facts = {"model": "org/model", "command": "dit-accel verify org/model", "runs": "in turns", "warm-up": "6 steps"}
    return ComparisonReport("WanPipeline", tuple(results), ("fast",), {}, 16, facts, ("fast: a note.",))


def card(**changes: Any) -> dict[str, Any]:
    """The card of :func:`report`."""
    environment = {"device": {"type": "cuda", "name": "NVIDIA H0"}, "platform": "Linux", "versions": {"torch": "2"}}
    made = make_card(
        report(),
        environment=environment,
        settings={"dtype": "bfloat16", "compiled": True, "call": {"guidance_scale": 5.0}},
        recipes={"fast": "fast"},
        sequence=Sequence((2, 24, 40), 1920, 1936, 30),
        note="idle otherwise",
    )
    return made | changes
