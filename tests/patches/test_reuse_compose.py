"""A LoRA, a calibration, and their likes beside a recipe that reuses steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig

import dit_accel
from dit_accel import calibrate, presets
from dit_accel.stages.reuse.listed import Listed
from tests.patches.test_reuse import KINDS, build, every_kind
from tests.recipes import POOLED
from tests.tiny import TINY

PARO = presets.paro(density=0.4, precision="model", dense_fraction=0.2, block=(32, 32))
LISTED = Listed((0, 1, 2, 4, 6), 7, order=1)


def _add_lora(pipe: Any) -> None:
    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


@every_kind
def test_a_lora_acts_in_computed_and_in_skipped_steps(kind: str) -> None:
    tiny, recipe = TINY["wan"], replace(POOLED, reuse=KINDS[kind])
    before, after = build(), build()
    _add_lora(before)
    with dit_accel.patch(before, recipe):
        expected = tiny.run(before, steps=7)
    with dit_accel.patch(after, recipe) as handle:
        plain = tiny.run(after, steps=7)
        _add_lora(after)
        # What blocks gave before the adapter came serves no run behind it.
        assert torch.equal(tiny.run(after, steps=7), expected)
        assert not torch.equal(expected, plain)
        after.transformer.disable_adapters()
        assert torch.equal(tiny.run(after, steps=7), plain)
        assert handle.summary().skipped_forwards > 0


@pytest.mark.parametrize("reuse", [LISTED, KINDS["first_block"]], ids=["listed", "first_block"])
def test_plans_of_a_calibration_serve_the_computed_steps(reuse: Any, tmp_path: Any) -> None:
    tiny = TINY["wan"]
    pipe = build()
    prompt = {k: v for k, v in tiny.call(torch.Generator().manual_seed(0)).items() if k != "generator"}
    path = tmp_path / "plans"
    calibrate(pipe, [prompt], PARO, generate_kwargs={"num_inference_steps": 5}, out=path)
    recipe = replace(PARO, reuse=reuse)
    with dit_accel.patch(pipe, recipe, calibration=path) as handle:
        first = tiny.run(pipe, steps=7)
        summary = handle.summary()
        assert torch.equal(tiny.run(pipe, steps=7), first)
    assert summary.skipped_forwards > 0
    assert summary.sparse_calls > 0
    assert first.isfinite().all()
