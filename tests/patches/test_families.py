"""Each transformer class: a patch finds its self-attention, its latents and its masks."""

import inspect
import itertools

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.layout import TokenLayout
from dit_accel.patches.reasons import NO_LATENTS
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.static import FullSelect, Window
from tests.patches.symbols import replaced_symbols
from tests.tiny_models import TinyModel
from tests.tiny_registry import MODELS

FULL = Recipe(order=Tiles((2, 2, 4)), select=FullSelect(block=(32, 32)))
WINDOW = Recipe(order=Tiles((2, 2, 4)), select=Window(window=(1.0, 3, 3), block=(32, 32)))
RADIUS = 1

every = pytest.mark.parametrize("name", MODELS)


def _footprint(model):
    """Hooks, attributes and classes of a model's modules, and the symbols of the seam."""
    seen = {}
    for path, module in model.named_modules():
        seen[path] = type(module)
        for key, value in vars(module).items():
            # Tensors beside parameters and buffers are tables that the model itself may make anew.
            table = value[0] if isinstance(value, list) and value else value
            if not isinstance(table, torch.Tensor):
                seen[path, key] = dict(value) if isinstance(value, dict) and "hook" in key else id(value)
    return seen | replaced_symbols()


def _calls(handle, run):
    """The calls of a forward that hold latents, each with what it gave, and the output of the forward."""
    calls, outputs = [], []
    with (
        handle.observe(lambda _, call: calls.append(call)),
        handle.tap_outputs(lambda _, out, __: outputs.append(out) or out),
    ):
        result = run()
    both = zip(calls, outputs, strict=True)
    return [(call, out) for call, out in both if call.layout != NO_LATENTS], result


@every
def test_dense_is_bit_equal_and_removal_is_complete(name):
    tiny = MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    before = _footprint(model)
    with dit_accel.patch(model, "dense") as handle:
        assert torch.equal(tiny.run(model), plain)
        summary = handle.summary()
    assert set(summary.dense_calls) - tiny.aside == {"recipe is dense"}
    assert all(layer.dense_calls for layer in summary.layers)
    assert _footprint(model) == before
    assert torch.equal(tiny.run(model), plain)


@every
def test_all_blocks_are_dense_attention(name):
    tiny = MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    with dit_accel.patch(model, FULL, backend="torch") as handle:
        out = tiny.run(model)
        assert set(handle.summary().dense_calls) == tiny.aside
    assert (out - plain).abs().max() <= tiny.tolerance * plain.abs().max()


@every
def test_arguments_may_be_given_by_place(name):
    tiny = MODELS[name]
    model, given = tiny.build(), tiny.given()
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    by_place = [given.pop(name) for name in itertools.takewhile(given.__contains__, names)]
    assert by_place
    with dit_accel.patch(model, FULL) as handle, torch.no_grad():
        model(*by_place, **given, return_dict=False)
        assert set(handle.summary().dense_calls) == tiny.aside


@every
def test_the_default_runs_and_leaves_short_sequences_alone(name):
    tiny = MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    with dit_accel.patch(model) as handle:
        assert torch.equal(tiny.run(model), plain)
        assert all("too few to gain" in why for why in set(handle.summary().dense_calls) - tiny.aside)


@every
def test_latents_lie_where_the_family_says(name):
    """Before the first attention nothing mixes tokens: changing one latent changes the query of one token."""
    tiny = MODELS[name]
    model = tiny.build()
    with dit_accel.patch(model, FULL) as handle:
        plain, _ = _calls(handle, lambda: tiny.run(model))
        last = tuple(size - 1 for size in tiny.grid)
        middle = tuple(size // 2 for size in tiny.grid)
        for place in ((0, 0, 0), (0, 0, 1), (0, 1, 0), middle, last):
            changed, _ = _calls(handle, lambda place=place: tiny.run(model, tiny.nudged(place)))
            differs = (changed[0][0].q - plain[0][0].q).abs().amax((0, 2, 3)) > 1e-6
            row = (place[0] * tiny.grid[1] + place[1]) * tiny.grid[2] + place[2]
            assert differs.nonzero().flatten().tolist() == [tiny.start + row], place
    layouts = {call.layout for call, _ in plain}
    assert layouts == {
        TokenLayout(tiny.grid, start, length, queries=tiny.queries) for length, start in tiny.layouts.items()
    }


def _seen(tiny: TinyModel, seq_len: int) -> torch.Tensor:
    """Bool ``[S, S]``: a window of three rows and columns among the latents, shifted at a border; all else in full."""
    frames, height, width = tiny.grid
    places = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width))

    def near(axis: int, size: int) -> torch.Tensor:
        x = places[:, axis]
        centre = x.clamp(RADIUS, max(RADIUS, size - 1 - RADIUS))
        return (x[None] - centre[:, None]).abs() <= RADIUS

    seen = torch.ones(seq_len, seq_len, dtype=torch.bool)
    start = tiny.layouts[seq_len]
    latents = slice(start, start + len(places))
    seen[latents, latents] = near(1, height) & near(2, width)
    return seen


@every
def test_sparse_is_dense_with_the_mask(name):
    tiny = MODELS[name]
    model = tiny.build()
    plain = tiny.run(model)
    with dit_accel.patch(model, WINDOW, backend="torch") as handle:
        calls, out = _calls(handle, lambda: tiny.run(model))
        summary = handle.summary()
    assert set(summary.dense_calls) == tiny.aside
    assert summary.density < 1
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, plain, rtol=1e-3)
    for call, output in calls:
        seen = _seen(tiny, call.q.shape[1])
        keys = torch.ones(1, len(seen), dtype=torch.bool) if call.key_mask is None else call.key_mask
        q, k, v = (x.double().transpose(1, 2) for x in (call.q, call.k, call.v))
        mask = seen & (keys[:, None, None] if call.pairs is None else call.pairs)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=call.scale).transpose(1, 2)
        assert (output.double() - call.of_queries(expected)).abs().max() <= tiny.tolerance
