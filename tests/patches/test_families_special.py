"""What single families do besides: other inputs, references, caches and masks."""

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers import transformer_flux2

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.patches.families.rasters import images
from tests.patches.test_families import FULL, WINDOW
from tests.tiny_flux import _ids
from tests.tiny_registry import MODELS


def _layouts(model, tiny, given):
    seen = set()
    with dit_accel.patch(model, FULL) as handle, handle.observe(lambda _, call: seen.add(call.layout)):
        tiny.run(model, given)
        dense = dict(handle.summary().dense_calls)
    return seen, dense


def _reason(name, change=None, model=None):
    """Why calls with changed inputs are dense; their output is the unpatched model's."""
    tiny = MODELS[name]
    model = tiny.build() if model is None else model
    given = tiny.given() | (change(tiny.given()) if change else {})
    plain = tiny.run(model, given)
    with dit_accel.patch(model, WINDOW) as handle:
        assert torch.equal(tiny.run(model, given), plain)
        summary = handle.summary()
    assert not summary.sparse_calls
    (reason,) = summary.dense_calls
    return reason


# LTX-2


def test_ltx2_finds_its_grid_by_coordinates_alone():
    """The pipelines that make a video in tiles pass no size."""
    tiny = MODELS["ltx2"]
    given = {name: value for name, value in tiny.given().items() if name not in ("num_frames", "height", "width")}
    layouts, dense = _layouts(tiny.build(), tiny, given)
    assert layouts == {TokenLayout(tiny.grid, 0, tiny.seq_len)}
    assert not dense


def test_ltx2_has_no_grid_where_its_coordinates_are_no_raster():
    def shuffled(given):
        order = torch.randperm(given["video_coords"].shape[2], generator=torch.Generator().manual_seed(0))
        return {"video_coords": given["video_coords"][:, :, order], "num_frames": None}

    assert "do not hold the latent grid ()" in _reason("ltx2", shuffled)


def test_ltx2_masks_of_its_references_stay_dense():
    def masked(given):
        tokens = given["hidden_states"].shape[1]
        mask = torch.ones(1, tokens, tokens, dtype=torch.float64)
        mask[:, :168, 168:] = 0
        return {"video_self_attention_mask": mask}

    assert "additive attention mask" in _reason("ltx2", masked)


def test_ltx2_leaves_sound_alone():
    tiny = MODELS["ltx2"]
    with dit_accel.patch(tiny.build(), FULL) as handle:
        layers = [layer.name for layer in handle.summary().layers]
    assert layers == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("ltx2", ("attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")),
        ("cosmos", ("attn2",)),
        ("allegro", ("attn2",)),
    ],
)
def test_other_attention_is_left_alone_and_named(name, others):
    model = MODELS[name].build()
    with dit_accel.patch(model, FULL) as handle:
        summary = handle.summary()
    assert set(summary.left_alone) == {f"transformer_blocks.*.{other}" for other in others}
    assert "left alone: transformer_blocks.*." in str(summary)
    taken = {layer.name for layer in summary.layers}
    assert all(hasattr(model.get_submodule(path.replace("*", "0")), "processor") for path in summary.left_alone)
    assert not taken & {path.replace("*", "0") for path in summary.left_alone}


def test_where_all_attention_is_of_the_latents_nothing_is_left_alone():
    with dit_accel.patch(MODELS["chroma"].build(), FULL) as handle:
        assert handle.summary().left_alone == ()
        assert "left alone" not in str(handle.summary())


# FLUX and its kin


@pytest.mark.parametrize("columns", [3, 4])
@pytest.mark.parametrize("batched", [False, True])
def test_a_grid_of_ids_is_that_of_the_first_image(columns, batched):
    def grid(*parts):
        ids = torch.cat(parts)
        generated, *others = images(ids[None].expand(2, -1, -1) if batched else ids)
        assert {other.grid for other in others} <= {(1, 2, 4)}
        return generated.grid, generated.start

    made, reference = _ids(3, 5, 0, columns), _ids(2, 4, 10, columns)
    assert grid(made) == ((1, 3, 5), 0)
    assert grid(made, reference, reference + 10) == ((1, 3, 5), 0)
    # a cache of references begins with them
    assert grid(reference, made) == ((1, 3, 5), 8)
    # FLUX.3 counts in halves
    assert grid(torch.cat([made[:, :1], made[:, 1:] / 2], 1)) == ((1, 3, 5), 0)
    # LongCat-Image counts from the prompt's length on
    assert grid(made + 512) == ((1, 3, 5), 0)
    for wrong in ((made[:-1],), (made[:7], reference, made[7:]), (made.flip(0)[5:], made[10:]), (made.roll(1, 0),)):
        with pytest.raises(ValueError, match="are no "):
            grid(*wrong)


def _with_caches():
    if not hasattr(transformer_flux2, "Flux2KVAttnProcessor"):
        pytest.skip(f"FLUX.2 of diffusers {diffusers.__version__} has no cache of references")
    model = MODELS["flux2"].build()
    for block in model.transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(transformer_flux2.Flux2KVParallelSelfAttnProcessor())
    return model


@pytest.mark.parametrize("size", [(4, 5), (12, 14)], ids=["a small reference", "as many tokens as the image"])
def test_flux2_fills_and_reads_a_cache_of_references_densely(size):
    tiny = MODELS["flux2"]
    model, outputs = _with_caches(), []
    given = tiny.given()
    count = size[0] * size[1]
    reference = torch.randn(1, count, 4, generator=torch.Generator().manual_seed(1)).double()
    references_first = {
        "hidden_states": torch.cat([reference, given["hidden_states"][:, :168]], 1),
        "img_ids": torch.cat([_ids(*size, 10, 4)[None], given["img_ids"][:, :168]], 1),
    }
    without = {"hidden_states": given["hidden_states"][:, :168], "img_ids": given["img_ids"][:, :168]}
    for recipe in (None, WINDOW):
        handle = None if recipe is None else dit_accel.patch(model, recipe)
        with torch.no_grad():
            first, cache = model(
                **given | references_first, kv_cache_mode="extract", num_ref_tokens=count, return_dict=False
            )
            outputs.append(
                (first, model(**given | without, kv_cache_mode="cached", kv_cache=cache, return_dict=False)[0])
            )
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert not handle.summary().sparse_calls
    assert "keys and queries differ in number" in handle.summary().dense_calls
    handle.remove()


def test_flux3_references_are_a_stream_of_their_own():
    tiny = MODELS["flux3"]
    g = torch.Generator().manual_seed(1)
    given = tiny.given() | {
        "image_cond_hidden_states": torch.randn(1, 20, 4, generator=g).double(),
        "image_cond_ids": _ids(4, 5, 0, 4),
    }
    layouts, dense = _layouts(tiny.build(), tiny, given)
    assert layouts == {TokenLayout((1, 14, 12), 9, 9 + 168 + 20), TokenLayout((1, 14, 12), 0, 168)}
    assert not dense


def test_chroma_adds_its_mask_to_the_scores_so_it_is_no_key_mask():
    """Hidden keys weigh less there by a factor of e, and a padded prompt still matters."""

    def masked(given):
        return {"attention_mask": torch.cat([torch.ones(1, 6), torch.zeros(1, 3), torch.ones(1, 188)], 1).double()}

    assert "additive attention mask" in _reason("chroma", masked)
    tiny = MODELS["chroma"]
    model, given = tiny.build(), tiny.given()
    mask = masked(given)["attention_mask"]
    added = tiny.run(model, given | {"attention_mask": mask})
    hidden = tiny.run(model, given | {"attention_mask": mask.bool()})
    assert not torch.allclose(added, hidden, rtol=1e-3)


def test_chroma_with_a_mask_of_bits_is_sparse():
    tiny = MODELS["chroma"]
    model, given = tiny.build(), tiny.given()
    given["attention_mask"] = torch.cat([torch.ones(1, 6), torch.zeros(1, 3), torch.ones(1, 188)], 1).bool()
    plain = tiny.run(model, given)
    with dit_accel.patch(model, FULL) as handle:
        assert (tiny.run(model, given) - plain).abs().max() <= 1e-9 * plain.abs().max()
        assert handle.summary().sparse_calls == 2


# Images of other shapes and batches


def test_lumina2_prompts_of_different_lengths_stay_dense():
    def two(given):
        return {
            name: torch.cat([value, value]) for name, value in given.items()
        } | {"encoder_attention_mask": torch.arange(9) < torch.tensor([[4], [9]])}  # fmt: skip

    tiny = MODELS["lumina2"]
    model = tiny.build()
    given = two(tiny.given())
    plain = tiny.run(model, given)
    with dit_accel.patch(model, FULL) as handle:
        assert (tiny.run(model, given) - plain).abs().max() <= 1e-9 * plain.abs().max()
        summary = handle.summary()
    # The refiner sees the latents alone.
    assert summary.sparse_calls == 1
    assert list(summary.dense_calls) == ["prompts of different lengths lie before the latents of a batch"]
    given["encoder_attention_mask"] = given["encoder_attention_mask"][:1].expand(2, -1)
    assert not _layouts(model, tiny, given)[1]


@pytest.mark.parametrize("packed", [False, True])
def test_hidream_takes_squares_and_packed_latents(packed):
    tiny = MODELS["hidream"]
    model, given = tiny.build(), tiny.given()
    if packed:
        # only of other shapes than a square, filled up to 256 tokens
        tokens, masks, sizes, ids = model.patchify(given["hidden_states"])
        given |= {"hidden_states": tokens, "hidden_states_masks": masks, "img_sizes": sizes, "img_ids": ids}
        expected = TokenLayout((1, 14, 12), 0, 256 + 24)
    else:
        given["hidden_states"] = given["hidden_states"][..., :24, :]
        expected = TokenLayout((1, 12, 12), 0, 144 + 24)
    layouts, dense = _layouts(model, tiny, given)
    assert layouts == {expected}
    assert not dense


def test_z_image_of_two_sizes_stays_dense():
    def two_sizes(given):
        first, second = given["x"]
        return {"x": [first, second.transpose(-1, -2).contiguous()]}

    tiny = MODELS["z-image"]
    model = tiny.build()
    given = tiny.given()
    given |= two_sizes(given)
    plain = [out.clone() for out in model(**given, return_dict=False)[0]]
    with dit_accel.patch(model, FULL) as handle:
        out = model(**given, return_dict=False)[0]
        assert all(torch.equal(a, b) for a, b in zip(plain, out, strict=True))
        assert not handle.summary().sparse_calls


def test_joy_image_of_two_sizes_stays_dense():
    def two_sizes(given):
        twice = {name: torch.cat([x, x]) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        return twice | {"shape_list": [[(1, 14, 12)], [(1, 12, 14)]]}

    assert "do not hold the latent grid ()" in _reason("joy-image-plus", two_sizes)


def test_kandinsky_masks_of_its_own_stay_dense():
    tiny = MODELS["kandinsky5"]
    model, given = tiny.build(), tiny.given()
    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX
    given |= {
        "hidden_states": torch.randn(1, 2, 32, 16, 4, generator=torch.Generator().manual_seed(1)),
        "visual_rope_pos": [torch.arange(2), torch.arange(16), torch.arange(8)],
        "sparse_params": {"sta_mask": torch.eye(4, dtype=torch.bool)[None, None], "P": 0.5, "to_fractal": True},
    }
    assert _reason("kandinsky5", lambda _: given, model) == "an attention mask that is no tensor"
