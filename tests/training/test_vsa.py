"""Video Sparse Attention as the engine and a pipeline run it: its equations in float64, with gradients."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.calibration.calibrate import refuse_calibration
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.coarse.api import block_means
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.order.cubes import Cubes, cube_slots
from dit_accel.stages.select.pooled import Pooled
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.calls import attend
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe

SMALL = dit_accel.presets.vsa(density=0.3, cube=(2, 4, 4))


def cubes_of(layout: TokenLayout, cube: tuple[int, int, int]) -> list[list[int]]:
    """Tokens of each cube in the model's order, from coordinates alone."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place in product(*map(range, layout.grid)):
        frame, row, column = place
        token = layout.latent_start + (frame * layout.grid[1] + row) * layout.grid[2] + column
        found.setdefault(tuple(at // step for at, step in zip(place, cube)), []).append(token)
    return [found[key] for key in sorted(found)]


def definition(q, k, v, gate, layout, cube, density, key_mask):
    """VSA from its equations, cube by cube, in the dtype of its inputs: (B, S, H, D)."""
    batch, seq_len, heads, dim = q.shape
    cubes = cubes_of(layout, cube)
    latents = {token for tokens in cubes for token in tokens}
    others = [token for token in range(seq_len) if token not in latents]
    out = torch.zeros_like(q)
    for b, h in product(range(batch), range(heads)):
        seen = torch.ones(seq_len, dtype=torch.bool) if key_mask is None else key_mask[b]
        means = [torch.stack([x[b, tokens, h].mean(0) for tokens in cubes]) for x in (q, k, v)]
        logits = means[0] @ means[1].T * dim**-0.5
        coarse = logits.softmax(-1) @ means[2]
        count = max(1, math.ceil(density * len(cubes)))
        text = [token for token in others if seen[token]]
        for i, tokens in enumerate(cubes):
            best = sorted(range(len(cubes)), key=lambda j: (-float(logits[i, j].detach()), j))[:count]
            keys = [token for j in best for token in cubes[j]] + text
            weights = (q[b, tokens, h] @ k[b, keys, h].T * dim**-0.5).softmax(-1)
            fine = weights @ v[b, keys, h]
            places = [token - layout.latent_start for token in tokens]
            out[b, tokens, h] = fine + gate[b, places, h] * coarse[i]
        if others:
            keys = [token for token in range(seq_len) if seen[token]]
            out[b, others, h] = (q[b, others, h] @ k[b, keys, h].T * dim**-0.5).softmax(-1) @ v[b, keys, h]
    return out


CASES = {
    "whole cubes": (TokenLayout((4, 8, 8), 0, 256), (4, 4, 4), 64, False),
    "ragged": (TokenLayout((5, 6, 9), 0, 270), (4, 4, 4), 64, False),
    "ragged, text first": (TokenLayout((3, 6, 9), 11, 173), (2, 4, 4), 96, False),
    "ragged, padded text last": (TokenLayout((3, 6, 9), 0, 175), (2, 4, 4), 128, True),
    "an image, text last": (TokenLayout((1, 7, 9), 0, 70), (4, 4, 2), 64, True),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_definition(case):
    layout, cube, dim, masked = CASES[case]
    generator = torch.Generator().manual_seed(3)
    draws = (torch.randn(2, layout.seq_len, 2, dim, generator=generator) for _ in range(4))
    q, k, v, upstream = draws
    gate = torch.randn(2, layout.num_latent, 2, dim, generator=generator)
    key_mask = None
    if masked:
        key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
        key_mask[0, layout.seq_len - 3 :] = False
    recipe = dit_accel.presets.vsa(density=0.3, cube=cube)
    engine = Engine(recipe, ["layer"], "auto", 0)
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, gate)]
    inputs = AttentionInputs(*leaves[:3], None if key_mask is None else key_mask[:, None, None])
    out = attend(engine, 0, inputs, layout, StepContext(), lambda: pytest.fail("dense"), learned=[leaves[3]])
    grads = torch.autograd.grad(out, leaves, upstream)

    twins = [tensor.double().requires_grad_() for tensor in (q, k, v, gate)]
    folded = cube if layout.grid[0] > 1 else (1, 8, 4)  # an image folds the depth into height and width
    wanted = definition(*twins, layout, folded, 0.3, key_mask)
    # Every value passes a few dozen float32 roundings; sums are over 270 tokens at most.
    assert (out - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    for label, grad, want in zip("qkvg", grads, torch.autograd.grad(wanted, twins, upstream.double())):
        assert (grad - want).abs().max() <= 1e-5 * want.abs().max(), label


def test_the_definition_leaves_something_out():
    """Or the test above could not fail on the choice."""
    layout, cube, dim, _ = CASES["ragged"]
    q, k, v, gate = torch.randn(4, 1, layout.seq_len, 1, dim, dtype=torch.float64)
    whole = definition(q, k, v, gate, layout, cube, 1.0, None)
    assert (definition(q, k, v, gate, layout, cube, 0.3, None) - whole).abs().max() > 0.1
    assert (definition(q, k, v, 0 * gate, layout, cube, 1.0, None) - whole).abs().max() > 0.1


@pytest.mark.parametrize("grid", [(4, 8, 8), (5, 6, 9), (1, 3, 2)])
def test_cubes_are_blocks(grid):
    """Every slot of a block is of one cube, or padding, and every token has one slot."""
    layout = TokenLayout(grid, 2, math.prod(grid) + 7)
    order = Cubes((4, 4, 4))
    padded = layout.padded(order.padding(layout))
    rows = order.rows(padded, torch.device("cpu"))
    assert rows is not None
    assert sorted(rows.tolist()) == list(range(padded.seq_len))
    cubes = cubes_of(layout, (4, 4, 4)) if grid[0] > 1 else [list(range(2, 8))]
    blocks = [
        set(rows[i : i + 64].tolist()) - set(range(layout.seq_len, padded.seq_len))
        for i in range(0, 64 * len(cubes), 64)
    ]
    assert blocks == [set(cube) for cube in cubes]
    assert sorted(rows[64 * len(cubes) :].tolist()) == [0, 1, *range(2 + layout.num_latent, layout.seq_len)]


def test_an_order_that_lacks_its_padding_says_so():
    with pytest.raises(ValueError, match="needs 98 tokens of padding for cubes of"):
        Cubes((4, 4, 4)).rows(TokenLayout((5, 3, 2), 0, 30).padded(1), torch.device("cpu"))


def test_slots_of_a_whole_grid_are_the_tiles_order():
    slots = cube_slots((4, 8, 4), (4, 4, 4), torch.device("cpu"))
    assert sorted(slots.tolist()) == list(range(128))


def test_block_means_have_the_gradient_of_a_mean():
    """Of visible tokens alone, each its share, also in a short last block."""
    x = torch.randn(2, 70, 3, 8, dtype=torch.float64).requires_grad_()
    rows = torch.stack([torch.randperm(70) for _ in range(3)])[None].to(torch.int32)
    key_mask = torch.rand(2, 70) > 0.3
    upstream = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(block_means(x, 32, rows=rows, key_mask=key_mask), x, upstream.float())
    twin = x.detach().clone().requires_grad_()
    wanted = torch.zeros(2, 3, 3, 8, dtype=torch.float64)
    for b, h, n in product(range(2), range(3), range(3)):
        tokens = [t for t in rows[0, h, 32 * n : 32 * (n + 1)].tolist() if key_mask[b, t]]
        wanted[b, h, n] = twin[b, tokens, h].mean(0)
    (want,) = torch.autograd.grad(wanted, twin, upstream)
    assert (grad - want).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["wan", "hunyuan", "cogvideox"])
def test_a_zero_gate_is_the_sparse_branch_alone(family):
    tiny = TINY[family]
    pipe = tiny.build()
    with dit_accel.patch(pipe, SMALL) as handle:
        with_branch = tiny.run(pipe, steps=2)
        assert handle.summary().density < 0.9
    with dit_accel.patch(pipe, SMALL.with_fields({"compensate": "none"})):
        assert torch.equal(tiny.run(pipe, steps=2), with_branch)
    with dit_accel.patch(pipe, SMALL):
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("dit_accel.bias"):
                parameter.data.fill_(0.5)
        assert not torch.equal(tiny.run(pipe, steps=2), with_branch)


def test_the_gate_is_of_the_layers_input():
    """A pipeline's layer, its gate and coarse branch worked out by hand from what the layer was given."""
    tiny = TINY["wan"]
    pipe = tiny.build()
    layer = pipe.transformer.blocks[0].attn1
    seen = {}
    layer.register_forward_pre_hook(lambda _module, args: seen.setdefault("hidden", args[0].detach().clone()))
    layer.to_out[0].register_forward_pre_hook(lambda _module, args: seen.setdefault("out", args[0].detach().clone()))
    with dit_accel.patch(pipe, SMALL) as handle:
        gate = layer.dit_accel
        assert gate.weight.shape == (layer.to_q.out_features, layer.to_q.in_features)
        torch.manual_seed(0)
        gate.weight.data.normal_(std=0.2)
        gate.bias.data.normal_()
        calls = []
        with handle.observe(lambda _name, call: calls.append(call)):
            tiny.run(pipe, steps=1)
    call = next(call for call in calls if call.layer == 0)
    keep = call.layout.seq_len - call.layout.padding
    q, k, v = (x[:, :keep].double() for x in (call.q, call.k, call.v))
    number = (seen["hidden"].double() @ gate.weight.double().T + gate.bias.double()).unflatten(-1, (q.shape[2], -1))
    layout = TokenLayout(call.layout.grid, call.layout.latent_start, keep)
    wanted = definition(q, k, v, number, layout, (2, 4, 4), 0.3, None).flatten(2)
    assert (seen["out"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def _gradients(checkpointing: bool = False, compiled: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    pipe = TINY["wan"].build()
    model = pipe.transformer
    with dit_accel.patch(pipe, SMALL):
        for name, parameter in model.named_parameters():
            if ".dit_accel." in name:
                parameter.data.normal_(std=0.1)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        latents = torch.randn(1, model.config.in_channels, 3, 12, 12)
        text = torch.randn(1, 8, model.config.text_dim)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        out = run(hidden_states=latents, timestep=torch.tensor([500]), encoder_hidden_states=text, return_dict=False)
        out[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["checkpointing", "compiled"])
def test_gradients_of_the_gate_are_the_same_however_it_runs(how):
    plain = _gradients()
    learned = [name for name in plain if ".dit_accel." in name]
    assert len(learned) == 4
    assert all(plain[name].abs().max() > 0 for name in learned)
    other = _gradients(**{how: True})
    assert other.keys() == plain.keys()
    for name, grad in plain.items():
        assert (other[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, name


def test_a_trained_gate_comes_back_from_its_adapter(tmp_path):
    """Gates trained with the model by the fine-tuning loop, saved, and read back."""
    pipe = tiny_pipe()
    recipe = SMALL.with_fields({"select.density": 0.1})
    config = FinetuneConfig(steps=12, learning_rate=5e-3, batch_size=2, train="all", evaluate_samples=1)
    result = finetune(pipe, recipe, samples(), tmp_path, config)
    losses = [entry["loss"] for entry in result.curves.steps]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    own = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters() if ".dit_accel." in name}
    assert all(value.abs().max() > 0 for value in own.values())
    wanted = TINY["wan"].run(pipe, steps=2)
    pipe = tiny_pipe()
    handle = dit_accel.load_adapter(pipe, tmp_path / "adapter")
    assert handle.recipe == recipe
    found = dict(pipe.transformer.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in own.items())
    # Of the model's own weights there are differences, added again: one rounding each.
    torch.testing.assert_close(TINY["wan"].run(pipe, steps=2), wanted, atol=1e-5, rtol=1e-4)
    handle.remove()
    assert not any(".dit_accel." in name for name, _ in pipe.transformer.named_parameters())


def test_recipes_that_cannot_be_say_so():
    with pytest.raises(ValueError, match=r"Cubes of \(4, 4, 4\) need blocks of \(64, 64\) tokens, got"):
        Recipe(order=Cubes(), select=Pooled(block=(128, 64)))
    with pytest.raises(ValueError, match="as many queries as keys"):
        dit_accel.presets.vsa().with_fields({"order": "tiles", "select.block": (128, 64)})
    with pytest.raises(ValueError, match="fills blocks with padding"):
        refuse_calibration(dit_accel.presets.vsa(), None)
    assert Recipe.from_dict(dit_accel.presets.vsa().to_dict()) == dit_accel.presets.vsa()
