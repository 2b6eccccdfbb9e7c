"""Families whose latents alone query: Cosmos 3, and Qwen-Image 2.1 with a prompt whose keys are cached."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import transformers

import dit_accel
from dit_accel import Recipe
from dit_accel.layout import LatentGrid, TokenLayout
from dit_accel.patches.families.rasters import ends_of, items
from dit_accel.patches.reasons import NO_LATENTS
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.pooled import Pooled
from tests.patches.test_families import FULL, WINDOW
from tests.tiny_packed import SOUND, TEXT, VIDEO
from tests.tiny_registry import MODELS

POOLED = Recipe(Tiles((1, 4, 4)), Pooled(density=0.3, block=(16, 16)), schedule=Schedule(dense_fraction=0.0))
QWEN, COSMOS3 = MODELS["qwen-image-2.1"], MODELS["cosmos3"]
PREFIX = 9 + 24


def _watched(model, recipe, run):
    """The calls of latents, each with its output, and what the model gave."""
    calls, outputs = [], []
    with (
        dit_accel.patch(model, recipe, backend="torch") as handle,
        handle.observe(lambda _, call: calls.append(call)),
        handle.tap_outputs(lambda _, out, __: outputs.append(out) or out),
    ):
        result = run()
        summary = handle.summary()
    both = [(call, out) for call, out in zip(calls, outputs, strict=True) if call.layout != NO_LATENTS]
    return both, result, summary


def _exact(call, out):
    """Largest error of a sparse call against dense attention in float64 under its plan's mask of tokens."""
    rows = call.plan.rows.flatten().long()
    seen = call.plan.mask.to_tokens()
    visible = torch.zeros_like(seen)
    visible[..., rows[:, None], rows[None, :]] = seen
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None]
    first, number = call.layout.queries
    mask = visible[..., first : first + number, :]
    q, k, v = (x.double().transpose(1, 2) for x in (call.of_queries(call.q), call.k, call.v))
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=call.scale).transpose(1, 2)
    assert (out.double() - expected).abs().max() <= 1e-9
    return mask


def _cached():
    if not hasattr(transformers, "QwenImage21Transformer2DModel"):
        pytest.skip("this diffusers has no Qwen-Image 2.1")
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    model = QWEN.build()
    return model, QwenImage21KVCache(len(model.transformer_blocks))


def _denoised(model, cache, steps=3):
    """What a pipeline's loop over the transformer gives, its latents moved by each output."""
    given, outputs = QWEN.given(), []
    with torch.no_grad():
        for step in range(steps):
            mode = None if cache is None else "cached" if step else "extract"
            out = model(**given, kv_cache=cache, kv_cache_mode=mode, return_dict=False)[0][:, -168:]
            outputs.append(out)
            latents = given["hidden_states"].clone()
            latents[:, 24:] += 0.1 * out
            given |= {"hidden_states": latents, "timestep": given["timestep"] * 0.8}
    return torch.cat(outputs)


def test_a_cached_prefix_is_read_as_keys():
    model, cache = _cached()
    plain = _denoised(model, cache)
    both, out, summary = _watched(model, FULL, lambda: _denoised(model, cache))
    layout = TokenLayout(QWEN.grid, PREFIX, QWEN.seq_len, queries=(PREFIX, 168))
    assert {call.layout for call, _ in both} == {layout}
    assert summary.sparse_calls == 3 * 2  # steps, layers
    # A prompt, an image to edit and more of the prompt, in the first step alone.
    assert summary.dense_calls == {NO_LATENTS: 3 * 2}
    assert (out - plain).abs().max() <= 1e-9 * plain.abs().max()


@pytest.mark.parametrize("kept", [True, False], ids=["a cache", "no cache"])
def test_an_image_to_edit_is_a_grid_of_keys(kept):
    model, cache = _cached()
    cache = cache if kept else None
    plain = _denoised(model, cache)
    both, out, summary = _watched(model, POOLED, lambda: _denoised(model, cache))
    references = (LatentGrid((1, 4, 6), 4),)
    layout = TokenLayout(QWEN.grid, PREFIX, QWEN.seq_len, references, queries=(PREFIX, 168))
    assert {call.layout for call, _ in both} == {layout}
    assert summary.density < 0.8
    assert not torch.allclose(out, plain, rtol=1e-3)
    for call, given in both:
        mask = _exact(call, given)
        text = call.key_mask[0].clone()
        text[4 : 4 + 24] = text[PREFIX:] = False
        assert mask[..., text].all()
        assert not mask[..., 4 : 4 + 24].all()


def test_a_plan_of_the_step_that_fills_the_cache_serves_the_next():
    model, cache = _cached()
    recipe = replace(POOLED, schedule=Schedule(dense_fraction=0.0, refresh_every=3))
    _, _, summary = _watched(model, recipe, lambda: _denoised(model, cache))
    assert [layer.plans_made for layer in summary.layers] == [1, 1]


def test_cosmos3_controls_are_grids_of_keys_and_its_heads_are_grouped():
    given = COSMOS3.given()
    control = torch.randn(1, 4, *given["vision_tokens"][0].shape[2:], generator=torch.Generator().manual_seed(1))
    number = 2 * 504
    rows = TEXT + torch.arange(number)
    places = given["position_ids"]
    video = places[:, TEXT : TEXT + 504]
    given |= {
        "vision_tokens": [control.double(), given["vision_tokens"][0]],
        "vision_token_shapes": [VIDEO, VIDEO],
        "vision_sequence_indexes": rows,
        "vision_mse_loss_indexes": rows[504:],
        "vision_noisy_frame_indexes": [torch.arange(0), torch.arange(3)],
        "sequence_length": TEXT + number + SOUND,
        "position_ids": torch.cat([places[:, :TEXT], video, video, places[:, TEXT + 504 :]], 1),
        "sound_sequence_indexes": TEXT + number + torch.arange(SOUND),
        "sound_mse_loss_indexes": TEXT + number + torch.arange(SOUND),
    }
    model = COSMOS3.build()

    def run():
        with torch.no_grad():
            return model(**given, return_dict=False)[0][1]

    plain = run()
    both, _, _ = _watched(model, FULL, run)
    assert {call.layout.grid for call, _ in both} == {VIDEO}
    both, out, summary = _watched(model, POOLED, run)
    length = TEXT + number + SOUND
    references = (LatentGrid(VIDEO, TEXT),)
    layout = TokenLayout(VIDEO, TEXT + 504, length, references, queries=(TEXT, number + SOUND))
    assert {call.layout for call, _ in both} == {layout}
    assert {call.k.shape[2] for call, _ in both} == {4}  # two heads of keys, each for two of queries
    assert summary.density < 0.5
    assert not torch.allclose(out, plain, rtol=1e-3)
    for call, given_out in both:
        mask = _exact(call, given_out)
        assert mask[..., :TEXT].all()
        assert mask[..., -SOUND:].all()
        assert mask[..., -SOUND:, :].all()


def test_items_of_a_packed_sequence_follow_each_other():
    places = torch.cat([torch.arange(3, 3 + 24), torch.arange(30, 30 + 12), torch.arange(50, 50 + 6)])
    shapes = [(1, 4, 6), (1, 3, 4), (1, 2, 3)]
    # of fewer tokens than are worth a grid: the second
    assert items(ends_of(places, shapes)) == [LatentGrid((1, 2, 3), 50), LatentGrid((1, 4, 6), 3)]
    broken = places.clone()
    broken[12:24] += 1
    assert items(ends_of(broken, shapes)) == [LatentGrid((1, 2, 3), 50)]
    broken[-1] += 1
    with pytest.raises(ValueError, match=r"6 latents of \(1, 2, 3\) lie from token 50 to token 56"):
        items(ends_of(broken, shapes))


@pytest.mark.parametrize("tiny", [QWEN, COSMOS3], ids=["qwen", "cosmos3"])
def test_a_compiled_transformer_does_the_same(tiny):
    model = tiny.build()
    with dit_accel.patch(model, WINDOW, backend="torch"):
        eager = tiny.run(model)
    model.compile(backend="eager")
    with dit_accel.patch(model, WINDOW, backend="torch") as handle:
        assert torch.allclose(tiny.run(model), eager, atol=1e-9)
        assert handle.summary().sparse_calls == 2
    torch._dynamo.reset()
