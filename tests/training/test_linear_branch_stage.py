"""SLA as the engine runs it: its definition in float64, with gradients; its parameters as modules."""

from __future__ import annotations

import copy
import math

import diffusers
import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import Choice
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate import linear as compensate_linear
from dit_accel.stages.compensate.linear import LinearBranch
from dit_accel.stages.compensate.none import NoCompensation
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.pooled import Pooled
from tests.calls import attend
from tests.recipes import SMALL_TILES
from tests.tiny import TINY

SLA = Recipe(order=SMALL_TILES, select=Pooled(density=0.3, block=(32, 32)), compensate=LinearBranch())


def _phi(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    if feature_map == "softmax":
        return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, torch.exp(x))
    if feature_map == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    return torch.cat([_phi(x, "softmax"), _phi(-x, "softmax")], -1)


def classes(q, k, layout, rows, block, density, negligible, key_mask):
    """Per token pair in the model's order: critical and negligible, bool (B, H, S, S), from loops."""
    batch, seq_len, heads, _ = q.shape
    latent = range(layout.latent_start, layout.latent_start + layout.num_latent)
    blocks = [rows[i : i + block] for i in range(0, seq_len, block)]
    extra = [any(token not in latent for token in tokens) for tokens in blocks]
    critical = torch.zeros(batch, heads, seq_len, seq_len, dtype=torch.bool)
    lowest = critical.clone()
    for b in range(batch):
        seen = [[t for t in tokens if key_mask is None or key_mask[b, t]] for tokens in blocks]
        for h in range(heads):
            for i, own in enumerate(blocks):
                free = [j for j in range(len(blocks)) if not extra[j] and seen[j]]
                score = {j: float(q[b, own, h].double().mean(0) @ k[b, seen[j], h].double().mean(0)) for j in free}
                ranked = sorted(free, key=lambda j: (-score[j], j))
                keep = set(ranked[: math.ceil(density * len(free))]) | {i}
                keep |= {j for j in range(len(blocks)) if extra[j]}
                keep = set(range(len(blocks))) if extra[i] else keep
                low = set(ranked[len(free) - math.ceil(negligible * len(free)) :]) if negligible else set()
                for j in range(len(blocks)):
                    cell = (b, h, torch.tensor(own)[:, None], torch.tensor(blocks[j])[None])
                    critical[cell] = j in keep
                    lowest[cell] = j in low
    return critical, lowest


def definition(q, k, v, weight, bias, critical, lowest, key_mask, form, feature_map, maps=None):
    """SLA from its equations, every token against every token: (B, S, H, D) in float64."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    visible = torch.ones_like(critical) if key_mask is None else key_mask[:, None, None].expand_as(critical)
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    sparse = logits.masked_fill(~(critical & visible), -torch.inf).softmax(-1) @ v
    if maps is not None:
        q, k = (torch.einsum("bhsd,hed->bhse", x, m) for x, m in zip((q, k), maps))
    taken = visible if form == "all_tokens" else visible & ~critical
    if form == "paper":
        taken = taken & ~lowest
    weights = (_phi(q, feature_map) @ _phi(k, feature_map).transpose(-1, -2)) * taken
    total = weights.sum(-1, keepdim=True) + (1e-5 if form == "all_tokens" else 0.0)
    linear = torch.where(total > 0, (weights @ v) / torch.where(total > 0, total, 1.0), 0.0)
    return (sparse + linear @ weight.T + bias).transpose(1, 2)


LAYOUTS = {
    "alone": TokenLayout((3, 6, 9), 0, 162),
    "text first": TokenLayout((3, 6, 9), 11, 173),
    "text last": TokenLayout((3, 6, 9), 0, 175),
}
CASES = [
    ("alone", 64, Raster(), 32, "paper", "softmax"),
    ("text last", 64, Tiles((2, 4, 4)), 32, "paper", "softmax"),
    ("text last", 96, Raster(), 32, "paper", "elu"),
    ("text first", 128, Tiles((2, 4, 4)), 32, "non_critical", "softmax"),
    ("alone", 96, Tiles((2, 4, 4)), 32, "non_critical", "relu"),
    ("text last", 128, Tiles((2, 4, 4)), 32, "all_tokens", "softmax"),
    ("text last", 64, Tiles((2, 4, 4)), 32, "paper", "hedgehog"),
    ("text last", 64, Tiles((4, 2, 2)), 16, "paper", "softmax"),
    ("alone", 64, Tiles((4, 2, 2)), 16, "all_tokens", "softmax"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(x).split("(")[0] for x in c))
def test_gradients_against_the_definition(case):
    name, dim, order, block, form, feature_map = case
    layout = LAYOUTS[name]
    generator = torch.Generator().manual_seed(5)
    q, k, v, upstream = (torch.randn(2, layout.seq_len, 2, dim, generator=generator) for _ in range(4))
    key_mask = None
    if name == "text last":
        key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
        key_mask[0, 168:] = False
        key_mask[1, 172:] = False
    recipe = Recipe(
        order=order,
        select=Pooled(density=0.2, block=(block, block)),
        compensate=LinearBranch(form=form, feature_map=feature_map, negligible_share=0.3),
    )
    engine = Engine(recipe, ["layer"], "auto", 0)
    layer = engine.learned[0] = recipe.compensate.build(2, dim)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / dim**0.5
    leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    mask = None if key_mask is None else key_mask[:, None, None]
    out = attend(engine, 0, AttentionInputs(*leaves, mask), layout, StepContext(), lambda: pytest.fail("dense"))
    names, parameters = zip(*layer.named_parameters())
    grads = torch.autograd.grad(out, (*leaves, *parameters), upstream)

    rows = order.rows(layout, q.device)
    rows = list(range(layout.seq_len)) if rows is None else rows.tolist()
    critical, lowest = classes(q, k, layout, rows, block, 0.2, 0.3, key_mask)
    twins = [tensor.detach().double().requires_grad_() for tensor in (q, k, v, *parameters)]
    exact = dict(zip(("q", "k", "v", *names), twins))
    maps = (exact["feature_q"], exact["feature_k"]) if feature_map == "hedgehog" else None
    wanted = definition(*twins[:3], exact["weight"], exact["bias"], critical, lowest, key_mask, form, feature_map, maps)
    # Every value passes a few dozen float32 roundings; sums are over 175 tokens at most.
    assert (out - wanted).abs().max() <= 4e-6 * wanted.abs().max()
    for label, grad, want in zip(exact, grads, torch.autograd.grad(wanted, twins, upstream.double())):
        assert (grad - want).abs().max() <= 1e-5 * want.abs().max(), label


def test_the_preset_takes_blocks_and_tiles():
    recipe = dit_accel.presets.sla(block=(16, 16), tile=(4, 2, 2), form="all_tokens")
    assert recipe.order == Tiles((4, 2, 2))
    assert recipe.select == Pooled(density=0.05, block=(16, 16))
    assert recipe.compensate == LinearBranch(form="all_tokens")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert dit_accel.presets.sla().order == Raster()
    with pytest.raises(ValueError, match=r"select.block must be two of \(16, 32, 64, 128\)"):
        dit_accel.presets.sla(block=(8, 16))


def test_classes_are_not_all_alike():
    """The definition above really has all three classes, or the test could not fail."""
    layout = LAYOUTS["alone"]
    q, k = torch.randn(2, 1, layout.seq_len, 1, 8)
    critical, lowest = classes(q, k, layout, list(range(162)), 32, 0.2, 0.3, None)
    assert critical.any()
    assert (lowest & ~critical).any()
    assert (~critical & ~lowest).any()


@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_zero_projection_is_the_sparse_branch_alone(family):
    """Run through a pipeline, bit for bit."""
    tiny = TINY[family]
    pipe = tiny.build()
    with dit_accel.patch(pipe, SLA):
        with_branch = tiny.run(pipe, steps=2)
    with dit_accel.patch(pipe, SLA.with_fields({"compensate": "none"})) as handle:
        assert torch.equal(tiny.run(pipe, steps=2), with_branch)
        assert handle.summary().density < 0.9
    pipe = tiny.build()
    with dit_accel.patch(pipe, SLA):
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("dit_accel.bias"):
                parameter.data.fill_(0.1)
        assert not torch.equal(tiny.run(pipe, steps=2), with_branch)


def test_parameters_are_modules_and_go_with_the_patch():
    pipe = TINY["wan"].build()
    before = {name for name, _ in pipe.transformer.named_parameters()}
    state = set(pipe.transformer.state_dict())
    handle = dit_accel.patch(pipe, SLA)
    added = {name for name, _ in pipe.transformer.named_parameters()} - before
    assert added == {f"blocks.{i}.attn1.dit_accel.{name}" for i in range(2) for name in ("weight", "bias")}
    handle.remove()
    assert {name for name, _ in pipe.transformer.named_parameters()} == before
    assert set(pipe.transformer.state_dict()) == state
    assert "save_pretrained" not in vars(pipe.transformer)


def test_dense_layers_get_no_parameters():
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, SLA.with_fields({"schedule.dense_layers": (-1,)})):
        names = [name for name, _ in pipe.transformer.named_parameters() if "dit_accel" in name]
    assert {name.split(".")[1] for name in names} == {"0"}


def test_saved_pipelines_load_in_stock_diffusers(tmp_path):
    tiny = TINY["wan"]
    pipe = tiny.build()
    state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with dit_accel.patch(pipe, SLA):
        pipe.transformer.save_pretrained(tmp_path / "transformer")
        assert any("dit_accel" in name for name in pipe.transformer.state_dict())
    loaded, info = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "transformer", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_a_deep_copy_has_no_parameters_of_the_patch():
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, SLA):
        twin = copy.deepcopy(pipe.transformer)
    assert not any("dit_accel" in name for name in twin.state_dict())
    with dit_accel.patch(twin, SLA):
        assert any("dit_accel" in name for name, _ in twin.named_parameters())


def test_parameters_stay_in_float32_when_the_model_is_cast():
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, SLA):
        layer = pipe.transformer.blocks[0].attn1.dit_accel
        layer.bias.data.fill_(1 + 2**-20)
        pipe.transformer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.float32
        assert (layer.bias == 1 + 2**-20).all()
        assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        assert torch.isfinite(TINY["wan"].run(pipe, steps=1)).all()


def test_autocast_trains_in_bf16():
    pipe = TINY["wan"].build()
    transformer = pipe.transformer
    with dit_accel.patch(transformer, SLA) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            out = transformer(
                torch.randn(1, 16, 3, 12, 16), torch.tensor([500]), torch.randn(1, 16, 32), return_dict=False
            )[0]
        out.float().square().mean().backward()
        assert handle.summary().density < 0.9
        grad = transformer.blocks[0].attn1.dit_accel.weight.grad
        assert grad is not None
        assert grad.dtype == torch.float32
        assert grad.abs().max() > 0


def test_compiled_code_trains_the_parameters():
    """The opaque operator hands the parameters in, so that a graph gives them the gradients of eager code."""
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randn(1, 16, 3, 12, 16, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 16, 32, generator=generator),
    )
    grads = []
    for compiled in (False, True):
        transformer = TINY["wan"].build().transformer
        with dit_accel.patch(transformer, SLA):
            model = torch.compile(transformer, backend="aot_eager") if compiled else transformer
            model(*inputs, return_dict=False)[0].square().mean().backward()
            grads.append({name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None})
    assert any("dit_accel" in name for name in grads[0])
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, name


def test_disabled_is_the_dense_model():
    tiny = TINY["wan"]
    pipe = tiny.build()
    dense = tiny.run(pipe, steps=2)
    with dit_accel.patch(pipe, SLA) as handle:
        sparse = tiny.run(pipe, steps=2)
        calls = handle.summary().to_dict()
        with handle.disabled():
            assert torch.equal(tiny.run(pipe, steps=2), dense)
        assert not torch.equal(sparse, dense)
        assert torch.equal(tiny.run(pipe, steps=2), sparse)
        assert calls != handle.summary().to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "half"}, "form must be one of paper"),
        ({"feature_map": "cosine"}, "feature_map must be one of softmax"),
        ({"negligible_share": 1.0}, r"negligible_share must lie in \[0, 1\)"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        LinearBranch(**changes)


def test_recipe_round_trip():
    recipe = dit_accel.presets.sla(feature_map="elu", form="non_critical")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.with_fields({"compensate": "none"}).compensate == NoCompensation()


@pytest.mark.parametrize("feature_map", ["softmax", "hedgehog"])
def test_the_branch_keeps_nothing_for_its_backward(feature_map):
    """Only inputs that live anyway: the branch's output is computed again, the lists are cut to their length."""
    grid = (4, 8, 16)
    layout = TokenLayout(grid, 0, 512)
    recipe = SLA.with_fields({"compensate.feature_map": feature_map, "compensate.negligible_share": 0.1})
    engine = Engine(recipe, ["layer"], "auto", 0)
    layer = engine.learned[0] = recipe.compensate.build(2, 32)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 512, 2, 32, generator=generator, requires_grad=True) for _ in range(3))
    calls, kept = [], []
    forward = layer.forward
    layer.forward = lambda out, *rest: calls.append((out, rest)) or out
    attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: None)
    (out, (call, plan)) = calls[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = forward(out, call, plan)
    known = {t.untyped_storage().data_ptr() for t in (out, call.q, call.k, call.v, *layer.parameters())}
    assert [t.shape for t in kept if t.untyped_storage().data_ptr() not in known] == []
    assert plan.compensation.kv_indices.shape[-1] == 3  # ceil(0.1 * 16) and one more
    result.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (layer.weight, layer.bias))


@pytest.mark.parametrize("form", ["paper", "non_critical", "all_tokens"])
def test_kernels_and_torch_give_the_same_gradients(form, monkeypatch):
    """The stage with the branch in one Triton function, and with torch computing it again; parameters handed in."""
    layout = TokenLayout((3, 6, 9), 0, 175)
    recipe = SLA.with_fields({"compensate.form": form})
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(2, 175, 2, 32, generator=generator) for _ in range(4))
    mask = torch.ones(2, 1, 1, 175, dtype=torch.bool)
    mask[1, ..., 170:] = False
    parameters = [torch.randn(32, 32, generator=generator) / 6, torch.randn(32, generator=generator)]
    results = []
    for kernels in (False, True):
        engine = Engine(recipe, ["layer"], "auto", 0)
        engine.learned[0] = recipe.compensate.build(2, 32)
        leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v, *parameters)]
        if kernels:
            monkeypatch.setattr(compensate_linear, "choose_linear", lambda *args: Choice("triton", "by the test"))
        step = StepContext()
        out = attend(engine, 0, AttentionInputs(*leaves[:3], mask), layout, step, lambda: None, learned=leaves[3:])
        assert (out.grad_fn.name() == "LinearBranchFunctionBackward") == kernels
        results.append((out.detach(), *torch.autograd.grad(out, leaves, upstream)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
