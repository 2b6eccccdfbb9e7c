"""Images to edit and condition frames: pairs with their tokens are selected like any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.call import AttentionCall
from dit_accel.layout import LatentGrid, TokenLayout
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.recipes import WINDOW
from tests.tiny import TINY

TEXT = 16
SIDE = 16
ALL_STEPS = Schedule(dense_fraction=0.0)


def _ids(image: int, height: int, width: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, image), rows, columns], -1).flatten(0, 1).float()


def _flux(*sizes: tuple[int, int]) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The tiny FLUX and a call of it, with an image of each size; the first is what is generated."""
    pipe = TINY["flux"].build()
    model, config = pipe.transformer, pipe.transformer.config
    tokens = sum(height * width for height, width in sizes)
    generator = torch.Generator().manual_seed(1)
    arguments = {
        "hidden_states": torch.randn(1, tokens, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cat([_ids(n, *size) for n, size in enumerate(sizes)]),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.tensor([3.5]) if config.guidance_embeds else None,
    }

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**arguments)[0]

    return model, call


def _watched(model: Any, recipe: Recipe, call: Callable[[], torch.Tensor]) -> tuple[list[AttentionCall], Any]:
    seen: list[AttentionCall] = []
    with dit_accel.patch(model, recipe) as handle:
        next(iter(handle.sessions.values())).engine.observer = seen.append
        call()
        return seen, handle.summary()


@pytest.mark.parametrize("select", [Pooled(density=0.2, block=(32, 32)), Mass(density=0.2, block=(32, 32))])
def test_a_density_is_kept_with_as_many_reference_tokens(select):
    model, call = _flux((SIDE, SIDE), (SIDE, SIDE))
    calls, summary = _watched(model, Recipe(Tiles((1, 8, 4)), select, schedule=ALL_STEPS), call)
    assert calls[0].layout == TokenLayout((1, SIDE, SIDE), TEXT, TEXT + 512, (LatentGrid((1, SIDE, SIDE), TEXT + 256),))
    # 16 blocks of images and one of text: each reads 4 of 16, itself and the text; the text reads all.
    assert (16 * 5 + 17) / 17**2 <= summary.density <= (16 * 6 + 17) / 17**2
    # Both images lose blocks, to themselves and to each other.
    kept = calls[0].plan.mask.to_dense()[0, 0, :16, :16]
    for queries in (slice(0, 8), slice(8, 16)):
        for keys in (slice(0, 8), slice(8, 16)):
            assert 0 < kept[queries, keys].sum() < 40


def test_references_of_other_sizes_and_what_is_no_raster():
    model, call = _flux((12, 8), (6, 10), (5, 7))
    calls, _ = _watched(model, Recipe(Tiles((1, 4, 4)), Pooled(density=0.5, block=(32, 32)), schedule=ALL_STEPS), call)
    assert calls[0].layout.references == (LatentGrid((1, 6, 10), TEXT + 96), LatentGrid((1, 5, 7), TEXT + 156))
    # Blocks of one grid follow those of another: none is wasted.
    rows = calls[0].plan.rows.flatten()
    assert torch.equal(rows.sort().values, torch.arange(TEXT + 191, dtype=torch.int32))
    assert torch.equal(rows[191:], torch.arange(TEXT, dtype=torch.int32))


def test_static_patterns_read_references_in_full():
    model, call = _flux((SIDE, SIDE), (SIDE, SIDE))
    calls, _ = _watched(model, WINDOW, call)
    assert calls[0].layout == TokenLayout((1, SIDE, SIDE), TEXT, TEXT + 512)
    visible = calls[0].plan.mask.to_tokens().expand(1, 1, -1, -1)[0, 0]
    rows = torch.arange(TEXT + 512) if calls[0].plan.rows is None else calls[0].plan.rows.flatten().long()
    reference = rows >= TEXT + 256
    assert visible[:, reference].all()
    assert visible[reference].all()
    assert not visible.all()


def test_a_compiled_transformer_sees_the_same_references():
    model, call = _flux((SIDE, SIDE), (8, 12))
    recipe = Recipe(Tiles((1, 8, 4)), Pooled(density=0.3, block=(32, 32)), schedule=ALL_STEPS)
    with dit_accel.patch(model, recipe):
        eager = call()
    model.compile(fullgraph=True, backend="eager")
    with dit_accel.patch(model, recipe) as handle:
        assert torch.allclose(call(), eager, atol=1e-5)
        assert handle.summary().sparse_calls
    torch._dynamo.reset()


def test_images_of_a_qwen_edit_are_grids():
    from dit_accel.patches.families.qwen_image import QWEN_IMAGE

    arguments = {"hidden_states": torch.zeros(1, 30, 4), "img_shapes": [[(1, 4, 5), (1, 2, 3), (1, 2, 2)]]}
    latents = QWEN_IMAGE.read((1, 2, 2), arguments)
    assert latents.grid == (1, 4, 5)
    assert latents.references == ((1, 2, 3, 20), (1, 2, 2, 26))
    assert latents.of_places(latents.places(), 30, None) == latents


def test_a_layout_survives_a_file():
    references = (LatentGrid((1, 2, 3), 30), LatentGrid((2, 2, 2), 40))
    for queries in (None, (3, 20)):
        layout = TokenLayout((1, 4, 5), 3, 60, references, queries)
        assert TokenLayout.from_numbers(layout.to_numbers()) == layout
    assert str(layout).endswith(", 20 queries from token 3")
    for damaged in (layout.to_numbers()[:-1], [*layout.to_numbers()[:-1], -1], [1, 4, 5, 3]):
        with pytest.raises(ValueError, match="A layout must be counts"):
            TokenLayout.from_numbers(damaged)
    assert "a reference of 2x2x2" in str(layout)


def test_a_packed_sequence_has_its_video_and_its_condition_as_grids():
    from tests.tiny_packed import CONDITION, PACKED_MODELS, SOUND, TEXT, VIDEO

    tiny = PACKED_MODELS["minimax-h3"]
    model = tiny.build()
    recipe = Recipe(Tiles((1, 4, 4)), Pooled(density=0.2, block=(32, 32)), schedule=ALL_STEPS)
    calls, summary = _watched(model, recipe, lambda: tiny.run(model))
    assert calls[0].layout == TokenLayout(VIDEO, TEXT + 20 + SOUND, tiny.seq_len, (LatentGrid(CONDITION, TEXT),))
    assert len(calls) == 2  # the refiner of the text is not one
    # Text and sound are read by all and read all: their outputs are near the dense ones.
    visible = calls[0].plan.mask.to_tokens()
    others = calls[0].plan.rows.flatten().long()
    others = (others < TEXT) | ((others >= TEXT + 20) & (others < TEXT + 20 + SOUND))
    assert visible[..., others].all()
    assert visible[..., others, :].all()
    assert summary.density < 0.5
