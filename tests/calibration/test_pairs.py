"""A calibration of a model that hides token pairs: what is hidden is neither scored, kept nor read."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_accel import CalibrationArtifact, Recipe, calibrate, patch
from dit_accel.kernels.mask.packed import unpack_bits
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.calibration.test_calibrate import _calls, _prompts
from tests.tiny import TINY

TOKENS, BLOCK, DENSITY = 126, 32, 0.5
STEPS = {"num_inference_steps": 3}


def _pairs() -> torch.Tensor:
    """bool ``[126, 126]``: each token sees itself and most up to 40 behind it; some blocks are hidden whole."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)[None]
    return (j <= i + 40) & ((7 * i + 3 * j) % 5 != 0) | (i == j)


class _Hiding(WanAttnProcessor):
    """Hides pairs of latents from each other."""

    # A processor's attention is looked for in its own module.
    __module__ = WanAttnProcessor.__module__

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        attention_mask = _pairs() if encoder_hidden_states is None else attention_mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


def _pipe():
    pipe = TINY["wan"].build(2)
    pipe.set_progress_bar_config(disable=True)
    for block in pipe.transformer.blocks:
        block.attn1.set_processor(_Hiding())
    return pipe


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """``[..., 4, 4, 32, 32]`` from ``[..., 126, 126]``, zeros behind the end."""
    x = torch.nn.functional.pad(x, (0, 2, 0, 2))
    return x.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-2, -3)


def _mass(call) -> torch.Tensor:
    """float64 ``[H, 4, 4]``: mass of the seen pairs of each block, over the batch."""
    q, k = (x.double().transpose(1, 2) for x in (call.q, call.k))
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~_pairs(), -torch.inf)
    return _blocks(logits.softmax(-1)).sum((-1, -2)).mean(0)


def _pooled(call) -> torch.Tensor:
    """float64 ``[H, 4, 4]``: softmax over seen blocks of the mean logit of their seen pairs, over the batch."""
    q, k = (x.double().transpose(1, 2) for x in (call.q, call.k))
    seen = _blocks(_pairs().double()).sum((-1, -2))
    logits = _blocks((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) * _pairs()).sum((-1, -2)) / seen
    return logits.masked_fill(seen == 0, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize(("select", "score"), [(Mass, _mass), (Pooled, _pooled)], ids=["mass", "pooled"])
def test_hidden_pairs_are_neither_scored_nor_kept_nor_read(select, score, tmp_path):
    pipe, prompts = _pipe(), _prompts("wan")
    recipe = Recipe(select=select(density=DENSITY, block=(BLOCK, BLOCK)))
    path = tmp_path / "pairs.safetensors"
    calibrate(pipe, prompts, recipe, out=path, buckets=1, generate_kwargs=STEPS)
    part = CalibrationArtifact.load(path).transformers["transformer"]
    seen = _blocks(_pairs()).any(-1).any(-1)
    assert 8 < seen.sum() < 16
    calls = _calls(pipe, prompts, steps=3)
    assert all(call.pairs is not None for _, call in calls)
    kept = [unpack_bits(part.masks.bits[0, layer], 4) for layer in range(2)]
    for layer in range(2):
        means = torch.stack([score(call) for _, call in calls if call.layer == layer]).mean(0)
        for head in range(2):
            for row in range(4):
                here = seen[row].nonzero()[:, 0]
                best = means[head, row, here].argsort(descending=True)[: math.ceil(DENSITY * len(here))]
                wanted = {int(here[n]) for n in best} | {row}
                assert set(kept[layer][head, row].nonzero()[:, 0].tolist()) == wanted
    outputs, patched = [], []
    with (
        patch(pipe, recipe, calibration=path, backend="torch") as handle,
        handle.observe(lambda _, call: patched.append(call)),
        handle.tap_outputs(lambda _, out, dense: outputs.append(out.clone()) or out),
    ):
        pipe(**STEPS, **prompts[0], generator=torch.Generator().manual_seed(3), output_type="latent")
        assert not handle.summary().dense_calls
    assert len(patched) == len(outputs) == 3 * 2 * 2  # steps, branches, layers
    for call, out in zip(patched, outputs, strict=True):
        tokens = kept[call.layer].repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :TOKENS, :TOKENS]
        q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
        mask = (tokens & _pairs())[None]
        exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
        # Sums of at most 126 float32 products of weights and values.
        assert (out.double() - exact).abs().max() <= TOKENS * torch.finfo(torch.float32).eps * v.abs().max()
