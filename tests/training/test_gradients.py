"""Gradients of the trainable recipes without parameters, against float64 autograd of what they define;
and what a call keeps for its backward. SLA's own are in ``test_linear_branch_stage``."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_accel import presets
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.common import capability
from dit_accel.layout import StepContext, TokenLayout
from tests.calls import attend
from tests.stages.oracle import masked_attention, pooled_tokens

LAYOUTS = {
    "alone": TokenLayout((3, 6, 9), 0, 162),
    "text first": TokenLayout((3, 6, 9), 11, 173),
    "text last": TokenLayout((3, 6, 9), 0, 175),
}


def circle_tokens(layout: TokenLayout, radius: float) -> torch.Tensor:
    """bool ``[S, S]``: latents see the disc around them in all frames, and text; text sees everything."""
    places = list(itertools.product(*map(range, layout.grid)))
    mask = torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool)
    for (i, (_, y, x)), (j, (_, v, u)) in itertools.product(enumerate(places), repeat=2):
        mask[layout.latent_start + i, layout.latent_start + j] = (y - v) ** 2 + (x - u) ** 2 < radius**2
    return mask


def plan_tokens(call: AttentionCall) -> torch.Tensor:
    """bool ``[B, H, S, S]`` in the model's order, from the plan that a call used."""
    slots = call.plan.mask.to_tokens()
    if call.plan.rows is None:
        return slots
    place = call.plan.rows.long().argsort(-1)
    wide = (*torch.broadcast_shapes(slots.shape[:2], place.shape[:2]), *slots.shape[2:])
    place = place.expand(*wide[:2], -1)
    return slots.expand(wide).gather(2, place[..., None].expand(wide)).gather(3, place[:, :, None].expand(wide))


def pyramid(q, k, v, call: AttentionCall) -> torch.Tensor:
    """PSA from its definition: one softmax over means of 1, 2, 4 or 8 neighbouring keys."""
    batch, seq_len, heads, dim = q.shape
    rows, block = call.plan.rows, call.plan.mask.block_q
    rows = torch.arange(seq_len)[None, None] if rows is None else rows.long()
    rows = rows.expand(batch, heads, seq_len)
    levels = call.plan.compensation.expand(batch, heads, -1, -1)
    visible = torch.ones(batch, seq_len) if call.key_mask is None else call.key_mask.double()
    outs = []
    for b, h in itertools.product(range(batch), range(heads)):
        order = rows[b, h]
        seen = visible[b, order].double()
        kb, vb, qb = k[b, order, h], v[b, order, h], q[b, order, h]
        logits, values = [], []
        for level in (1, 2, 4, 8):
            runs = torch.arange(seq_len) // level
            member = (runs[None] == torch.arange(int(runs[-1]) + 1)[:, None]).double() * seen
            count = member.sum(-1)
            mean = member / count.clamp_min(1)[:, None]
            read = levels[b, h][:, torch.arange(len(count)) * level // block] == level
            read = read.repeat_interleave(block, 0)[:seq_len] & (count > 0)
            score = qb @ (mean @ kb).T * dim**-0.5 + count.clamp_min(1).log()
            logits.append(score.masked_fill(~read, -torch.inf))
            values.append(mean @ vb)
        out = torch.cat(logits, 1).softmax(-1) @ torch.cat(values)
        outs.append(out[order.argsort()])
    return torch.stack(outs).view(batch, heads, seq_len, dim).transpose(1, 2)


def rectified(q, k, v, call: AttentionCall) -> torch.Tensor:
    """Rectified SpaAttn from its definition: the shares of the plan are constants, as its blocks are."""
    shares, mask = call.plan.compensation[0], call.plan.mask
    left_out = ~mask.to_dense()
    seen = masked_attention(q, k, v, plan_tokens(call) & key_mask_of(call)[:, None, None])
    batch, seq_len, heads, dim = q.shape
    rows = call.plan.rows.long().expand(batch, heads, seq_len)
    visible, out = key_mask_of(call), torch.zeros_like(seen)
    for b, h in itertools.product(range(batch), range(heads)):
        means = []
        for tokens in rows[b, h].split(mask.block_k):
            shown = tokens[visible[b, tokens]]
            means.append(v[b, shown, h].mean(0) if len(shown) else torch.zeros(dim, dtype=v.dtype))
        for i, tokens in enumerate(rows[b, h].split(mask.block_q)):
            weight = torch.where(left_out[b, h, i], shares[b, h, i], 0.0).double()
            out[b, tokens, h] = (1.0 - weight.sum()) * seen[b, tokens, h] + weight @ torch.stack(means)
    return out


def key_mask_of(call: AttentionCall) -> torch.Tensor:
    """bool ``[B, S]``."""
    return torch.ones(call.q.shape[:2], dtype=torch.bool) if call.key_mask is None else call.key_mask


RECIPES = {
    "sparge2": presets.sparge2(density=0.2, top_p=0.3, block=(32, 32)),
    "ssa": presets.ssa(density=0.3, block=(32, 32)),
    "clear": presets.clear(radius=3.0),
    "vmoba": presets.vmoba(temporal=1, spatial=(3, 3), volume=(2, 3, 3), block=(32, 32)),
    # Half of the tokens sampled: tiles of 16, the least that the kernels multiply.
    "psa": presets.psa(cumulative=(0.2, 0.4, 0.6, 0.9), similarity=(), block=(32, 32)).with_fields(
        {"select.share": 0.5, "compensate.share": 0.5}
    ),
    "rectified": presets.rectified(top_p=0.05, dense_layers=(), gain_aware=False).with_fields(
        {"select.block": (32, 32), "select.neighbours": 0}
    ),
}
CASES = [("alone", 64), ("text first", 96), ("text last", 128)]


@pytest.mark.parametrize(("name", "dim"), CASES, ids=lambda x: str(x))
@pytest.mark.parametrize(
    ("recipe_name", "backend"), [*((recipe, "auto") for recipe in RECIPES), ("psa", "triton")], ids=str
)
def test_gradients_against_the_definition(recipe_name, backend, name, dim):
    recipe, layout = RECIPES[recipe_name], LAYOUTS[name]
    if backend == "triton" and not capability.interpreted():
        pytest.skip("no Triton here")
    generator = torch.Generator().manual_seed(7)
    q, k, v, upstream = (torch.randn(2, layout.seq_len, 2, dim, generator=generator) for _ in range(4))
    key_mask = None
    if name == "text last":
        key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
        key_mask[0, 168:] = False
        key_mask[1, 172:] = False
    engine, calls = Engine(recipe, ["layer"], backend, 0), []
    engine.observer = calls.append
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    mask = None if key_mask is None else key_mask[:, None, None]
    out = attend(engine, 0, AttentionInputs(*leaves, mask), layout, StepContext(), lambda: pytest.fail("dense"))
    grads = torch.autograd.grad(out, leaves, upstream)

    twins = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    if recipe_name == "psa":
        assert len(calls[0].plan.compensation.unique()) >= 4, "too few levels, the case shows nothing"
        wanted = pyramid(*twins, calls[0])
    elif recipe_name == "rectified":
        shares = calls[0].plan.compensation[0]
        assert float(torch.where(calls[0].plan.mask.to_dense(), 0.0, shares).sum(-1).max()) > 0.1
        wanted = rectified(*twins, calls[0])
    else:
        if recipe_name == "clear":
            tokens = circle_tokens(layout, 3.0)
        elif recipe_name == "vmoba":
            tokens = plan_tokens(calls[0])  # which blocks it selects has tests of its own
        else:
            tokens = pooled_tokens(
                layout,
                list(range(layout.seq_len)),
                q,
                k,
                (32, 32),
                recipe.select.density,
                recipe.select.top_p,
                key_mask,
            )
        if key_mask is not None:
            tokens = tokens & key_mask[:, None, None]
        assert tokens.double().mean() < 0.97
        wanted = masked_attention(*twins, tokens)
    assert (out - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    for label, grad, want in zip("qkv", grads, torch.autograd.grad(wanted, twins, upstream.double())):
        assert (grad - want).abs().max() <= 1e-5 * want.abs().max(), label


@pytest.mark.parametrize("recipe_name", ["sla", "sparge2", "clear", "psa"])
def test_what_a_call_keeps_for_its_backward_grows_with_the_tokens(recipe_name):
    """No tensor of the size of the logits: twice the tokens keep about twice the bytes, not four times."""
    recipe = presets.sla(density=0.1, block=(32, 32)) if recipe_name == "sla" else RECIPES[recipe_name]
    kept = []
    for frames in (4, 8):
        layout = TokenLayout((frames, 16, 16), 0, frames * 256)
        engine = Engine(recipe, ["layer"], "auto", 0)
        if recipe_name == "sla":
            engine.learned[0] = recipe.compensate.build(1, 64)
        q, k, v = (torch.randn(1, layout.seq_len, 1, 64, requires_grad=True) for _ in range(3))
        sizes: dict[int, int] = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: pytest.fail("dense"))
        out.sum().backward()
        assert max(sizes.values()) < layout.seq_len**2 * 4 / 2
        kept.append(sum(sizes.values()))
    assert kept[1] < 2.6 * kept[0]


@pytest.mark.parametrize("fine", [False, True], ids=["paper", "tiles of 16"])
def test_a_call_of_sla_keeps_at_most_three_tenths_more_than_flash_attention(fine):
    """Bytes between forward and backward, of the kernels as they run on a GPU: q, k, v, the sparse output and its
    log-sum-exp, the output; flash attention keeps all of these but one output."""
    pytest.importorskip("triton")
    layout = TokenLayout((4, 16, 16), 0, 1024)
    options = {"block": (16, 16), "tile": (4, 2, 2), "form": "all_tokens"} if fine else {}
    recipe = presets.sla(density=0.05, **options)
    backend = "triton" if torch.cuda.is_available() or capability.interpreted() else pytest.skip("no Triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = Engine(recipe, ["layer"], backend, 0)
    engine.learned[0] = recipe.compensate.build(2, 64).to(device)
    shape = (1, layout.seq_len, 2, 64)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3))
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: pytest.fail("dense"))
    for tensor in (q, k, v, out):
        pack(tensor.detach())
    own = {p.untyped_storage().data_ptr() for p in engine.learned[0].parameters()}
    ours = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    flash = 4 * out.nbytes + 4 * layout.seq_len * 2
    assert ours > flash, "the sparse output is kept besides"
    assert ours <= 1.3 * flash
