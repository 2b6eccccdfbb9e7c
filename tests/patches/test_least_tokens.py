"""How long a sequence must be is asked of the device that a call is on, not of the machine or of a model once."""

from __future__ import annotations

import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.engine import Engine
from dit_accel.layout import TokenLayout
from dit_accel.patches.families import FAMILIES
from dit_accel.stages.select.pooled import Pooled
from dit_accel.worthwhile import LEAST_ON_CPU, why_not_worthwhile
from tests.tiny import TINY

GPU = torch.device("cuda", 0)


def reason(engine: Engine, tokens: int, device: torch.device) -> str | None:
    return why_not_worthwhile(TokenLayout((1, 1, tokens), 0, tokens), device, engine.min_tokens)


def test_a_cpu_gains_earlier_than_a_gpu():
    cpu = torch.device("cpu")
    for family in FAMILIES:
        engine = Engine(Recipe(select=Pooled()), ["layer"], "auto", family.min_tokens, automatic=True)
        assert reason(engine, LEAST_ON_CPU - 1, cpu) == "2047 tokens, too few to gain (below 2048)"
        assert reason(engine, LEAST_ON_CPU, cpu) is None
        for device in (GPU, torch.device("mps")):
            assert f"below {family.min_tokens}" in str(reason(engine, family.min_tokens - 1, device))
            assert reason(engine, family.min_tokens, device) is None
    # Who asks for less gets it.
    assert reason(Engine(Recipe(select=Pooled()), ["layer"], "auto", 0, automatic=True), 1, cpu) is None


def test_a_patched_pipeline_on_the_cpu_of_a_gpu_machine(monkeypatch):
    pipe = TINY["wan"].build()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with dit_accel.patch(pipe) as handle:
        TINY["wan"].run(pipe)
        (why,) = handle.summary().dense_calls
    assert f"below {LEAST_ON_CPU}" in why


def test_advice_is_of_the_device_too():
    engine = Engine(Recipe(select=Pooled()), ["layer"], "auto", 8192)
    layout = TokenLayout((1, 1, 4096), 0, 4096)
    engine._advise(layout, torch.device("cpu"))
    assert not engine.notes
    engine._advise(layout, GPU)
    assert list(engine.notes) == [
        "The recipe may be slower than dense here: 4096 tokens, too few to gain (below 8192)."
    ]
