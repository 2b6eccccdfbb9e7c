"""A learned gate on the output: its equation with gradients, alone and with 8 bits, and its training."""

from __future__ import annotations

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate.none import NoCompensation
from dit_accel.stages.compensate.output_gate import OutputGate
from dit_accel.stages.select.pooled import Pooled
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.calls import attend
from tests.recipes import SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe

GATED = Recipe(order=SMALL_TILES, select=Pooled(density=0.4, block=(32, 32)), compensate=OutputGate())
LAYOUTS = [TokenLayout((3, 6, 9), 0, 162), TokenLayout((3, 6, 9), 11, 173), TokenLayout((3, 6, 9), 0, 175)]


@pytest.mark.parametrize("precision", ["model", "int8"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["alone", "text first", "text last"])
def test_against_its_equation(layout, whole, precision):
    """The gate is of the latents, or of the whole sequence, of which those of other tokens are not read."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, layout.seq_len, 2, 64, generator=generator) for _ in range(3))
    start, count = layout.latent_start, layout.num_latent
    gate = torch.randn(1, layout.seq_len if whole else count, 2, 64, generator=generator).requires_grad_()
    recipe = GATED.with_fields({"precision": precision})
    engine = Engine(recipe, ["layer"], "auto", 0)
    v.requires_grad_()
    inputs = AttentionInputs(q, k, v)
    out = attend(engine, 0, inputs, layout, StepContext(), lambda: pytest.fail("ran dense"), [gate])
    plain = Engine(recipe.with_fields({"compensate": "none"}), ["layer"], "auto", 0)
    alone = attend(plain, 0, inputs, layout, StepContext(), lambda: pytest.fail("ran dense"))
    wanted, twin = alone.double(), gate.detach().double().requires_grad_()
    own = twin[:, start : start + count] if whole else twin
    latents = wanted[:, start : start + count] * 2 / (1 + (-own).exp())
    wanted = torch.cat([wanted[:, :start], latents, wanted[:, start + count :]], 1)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    weight = torch.randn(out.shape, generator=generator)
    found = torch.autograd.grad(out, (gate, v), weight)
    for got, want in zip(found, torch.autograd.grad(wanted, (twin, v), weight.double()), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_untrained_it_changes_nothing_and_trained_it_comes_back(tmp_path):
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, Recipe(GATED.order, GATED.select, NoCompensation())):
        plain = TINY["wan"].run(pipe, steps=2)
    with dit_accel.patch(pipe, GATED):
        torch.testing.assert_close(TINY["wan"].run(pipe, steps=2), plain, rtol=1e-5, atol=1e-5)
    config = FinetuneConfig(steps=3, learning_rate=0.05, train="learned", evaluate_samples=1)
    result = finetune(pipe, GATED.with_fields({"precision": "int8"}), samples(2), tmp_path, config)
    gated = TINY["wan"].run(pipe, steps=2)
    assert (gated - plain).abs().max() > 1e-3
    result.handle.remove()
    with dit_accel.load_adapter(pipe, result.adapter):
        assert torch.equal(TINY["wan"].run(pipe, steps=2), gated)
