"""What every selection promises, whatever its method: no padding, all text, own block, exact composition."""

import dataclasses

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.plan import SequenceBlocks
from dit_accel.recipe import SELECTS
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.static import FullSelect
from tests.calls import attend, call_of, gated, give_gates
from tests.stages.block_oracle import CPU, LAYOUTS, half_hidden, inputs
from tests.stages.oracle import masked_attention
from tests.stages.plan_oracle import assert_attends

# Fields that suit grids of a few hundred tokens.
SMALL = {
    "block": (32, 32),
    "window": (1, 3, 3),
    "tile": (2, 4, 4),
    "radius": 3.0,
    "min_width": 8,
}
# Fields at which something is left out there.
SPARSE = {
    **SMALL,
    "top_p": 0.4,
    "similarity": 0.0,
    "neighbours": 0,
    "stride": (1, 2, 2),
    "sink_first_frame": False,
    "rules": (("strided 2",),),
}
KINDS = [name for name in SELECTS if name != "dense"]


def _small(name: str):
    kind = SELECTS[name]
    return kind(**{f.name: SMALL[f.name] for f in dataclasses.fields(kind) if f.name in SMALL})


def _mask(select, layout, rows, key_mask=None):
    q, k = inputs(layout)
    blocks = SequenceBlocks(layout, rows, *select.block, CPU)
    mask = select.select(blocks, select.prepare(blocks), gated(call_of(q, k, key_mask=key_mask), select))
    tokens = mask.to_tokens().expand(2, 3, -1, -1)
    if rows is None:
        return mask, tokens
    slots = blocks.kernel_rows.long().expand(2, 3, -1)
    model = torch.zeros_like(tokens)
    for b in range(2):
        for h in range(3):
            model[b, h][slots[b, h][:, None], slots[b, h][None, :]] = tokens[b, h]
    return mask, model


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_text_and_own_tokens_are_always_read(kind, name, order):
    layout = LAYOUTS[name]
    _, tokens = _mask(_small(kind), layout, order.rows(layout, CPU))
    text = torch.ones(layout.seq_len, dtype=torch.bool)
    text[layout.latent_start : layout.latent_start + layout.num_latent] = False
    assert tokens[..., :, text].all(), "text must be read by all"
    assert tokens[..., text, :].all(), "text must read all"
    assert tokens.diagonal(dim1=-2, dim2=-1).all(), "a token must read itself"


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_padding_are_never_read(kind):
    layout = dataclasses.replace(LAYOUTS["text last"], seq_len=290)
    key_mask = half_hidden(layout)
    key_mask[0, 200:] = False
    mask, _ = _mask(_small(kind), layout, None, key_mask)
    dense = mask.to_dense().expand(2, mask.kv_indices.shape[1], -1, -1)
    assert not dense[0, :, :, 7:].any(), "blocks 7 and later are hidden"
    assert dense[1, :, :, 7:].all(), "those of the other sequence are text"
    # every kept block that holds a hidden key, or ends short, is listed behind the full ones
    full = torch.arange(mask.kv_indices.shape[-1]) < mask.kv_num_full[..., None]
    listed = mask.kv_indices.expand(2, *mask.kv_indices.shape[1:])
    full = full.expand(2, *full.shape[1:])
    hidden = torch.nn.functional.pad(~key_mask, (0, 30), value=True).unflatten(1, (-1, 32)).any(-1)
    for b in range(2):
        assert not hidden[b][listed[b][full[b]].long()].any()


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_computes_softmax_over_what_the_mask_shows(kind, order):
    layout = LAYOUTS["text first"]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    select = _small(kind)
    key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
    key_mask[0, :5] = False
    _, tokens = _mask(select, layout, order.rows(layout, CPU), key_mask)
    engine = Engine(Recipe(order=order, select=select), ["layer"], "auto", 0)
    give_gates(engine, 3, q.shape[-1])

    def dense():
        raise AssertionError("fell back to dense attention")

    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), dense)
    expected = masked_attention(q, k, v, tokens & key_mask[:, None, None])
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize("hidden", [False, True], ids=["all seen", "some hidden"])
@pytest.mark.parametrize("preset", [name for name in presets.PRESETS if name not in ("dense", "paro", "vsa")])
@pytest.mark.parametrize("name", ["text last", "image"])
def test_every_preset_computes_what_its_plan_says_along_a_trajectory(preset, name, hidden):
    layout, recipe = LAYOUTS[name], presets.resolve(preset)
    known = [f.name for f in dataclasses.fields(recipe.select)]
    recipe = recipe.with_fields({f"select.{field}": SPARSE[field] for field in known if field in SPARSE})
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    key_mask = half_hidden(layout) if hidden else None
    engine = Engine(recipe, ["first", "second", "third"], "auto", 0)
    give_gates(engine, 3, q.shape[-1])
    calls, left_out = [], []
    engine.observer = calls.append
    for index in range(0, 10, 2):
        for layer in range(3):
            step = StepContext(index=index, num_steps=10, sigma=1 - index / 10, forward_id=index)
            out = attend(engine, layer, AttentionInputs(q, k, v, key_mask), layout, step, lambda: v)
            call = calls.pop()
            plan = call.plan
            if plan is None:
                assert out is v, "a dense call is the model's own"
            else:
                if call.left_out is not None:  # what a dense step showed, see test_carried.py
                    age = call.step.progress - call.left_out.made.progress
                    out = out - (1 - age / recipe.compensate.lasts) * call.left_out.difference
                assert_attends(recipe, plan, out, q, k, v, key_mask)
                left_out.append(bool((~plan.mask.to_tokens()).any()))
    # Radial bands begin two frames away.
    reads_all = type(recipe.select) is FullSelect or (preset == "radial" and name == "image")
    assert reads_all or all(left_out), "nothing to stand in for"
    assert engine.records[2].sparse_calls >= 2
