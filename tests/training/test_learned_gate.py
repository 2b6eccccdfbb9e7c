"""A learned selection: its equations in float64, what it chooses untrained, and its training on the dense model."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

import dit_accel
from dit_accel.calibration.calibrate import refuse_calibration
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.select.gate_forms import FORMS
from dit_accel.stages.select.learned import Learned, gate_divergence
from dit_accel.stages.select.pooled import Pooled
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from dit_accel.training.gate import gate_losses
from dit_accel.training.noisy import NoisyBatch
from dit_accel.training.objective import OBJECTIVES, Objective, losses
from tests.calls import call_of
from tests.recipes import SMALL_TILES
from tests.tiny import TINY
from tests.training.samples import samples, tiny_pipe
from tests.training.test_linear_branch_stage import LAYOUTS

GATE = Learned(density=0.3, rank=12, block=(32, 32))
SEER = dit_accel.Recipe(order=SMALL_TILES, select=GATE)


def definition(q, k, layout, rows, block, project_q, project_k, key_mask):
    """Scores of block pairs from the equations, block by block, in the dtype of the projections."""
    batch, seq_len, heads, dim = q.shape
    kind, rank = project_q.dtype, project_q.shape[-1]
    blocks = [rows[i : i + block] for i in range(0, seq_len, block)]

    def place(tokens):
        on_grid = [t - layout.latent_start for t in tokens if 0 <= t - layout.latent_start < layout.num_latent]
        _, height, width = layout.grid
        axes = [[t // (height * width), t // width % height, t % width] for t in on_grid]
        return torch.tensor([sum(c) / len(axes) for c in zip(*axes)] if axes else [0.0] * 3, dtype=kind)

    def turned(x, where):
        half, out = rank // 2, x.clone()
        for pair in range(half):
            axis, number = divmod(pair, rank // 6)
            angle = where[axis] * 100.0 ** (-number / (rank // 6))
            a, b = x[pair], x[pair + half]
            out[pair] = a * angle.cos() - b * angle.sin()
            out[pair + half] = a * angle.sin() + b * angle.cos()
        return out

    scores = torch.zeros(batch, heads, len(blocks), len(blocks), dtype=kind)
    for b, h, i, j in product(range(batch), range(heads), range(len(blocks)), range(len(blocks))):
        seen = [t for t in blocks[j] if key_mask is None or key_mask[b, t]]
        asked = q[b, blocks[i], h].to(kind).mean(0)
        keys = k[b, seen, h].to(kind)
        parts = [keys.mean(0), keys.amax(0), keys.amin(0)] if seen else [torch.zeros(dim, dtype=kind)] * 3
        low_q = turned(asked @ project_q[h], place(blocks[i]))
        low_k = turned(torch.cat(parts) @ project_k[h], place(blocks[j]))
        scores[b, h, i, j] = dim**-0.5 * asked @ parts[0] + low_q @ low_k
    return scores


@pytest.mark.parametrize("name", ["alone", "text first", "text last"])
def test_scores_divergence_and_gradients_against_the_definition(name):
    layout, dim = LAYOUTS[name], 64
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, layout.seq_len, 2, dim, generator=generator) for _ in range(2))
    key_mask = None
    if name == "text last":
        key_mask = torch.ones(1, layout.seq_len, dtype=torch.bool)
        key_mask[0, layout.seq_len - 2 :] = False
    rows = SMALL_TILES.rows(layout, q.device)
    blocks = SequenceBlocks(layout, rows, 32, 32, q.device)
    call = call_of(q, k, key_mask=key_mask)
    gate = call.router = GATE.build(2, dim)
    with torch.no_grad():
        gate.project_q += torch.randn(gate.project_q.shape, generator=generator) * 0.3
    tables = GATE.prepare(blocks)
    scores = GATE.scores(blocks, tables, call)
    twins = [p.detach().double().requires_grad_() for p in (gate.project_q, gate.project_k)]
    wanted = definition(q, k, layout, rows.tolist(), 32, *twins, key_mask)
    # A few dozen float32 roundings, and angles of up to ten.
    assert (scores - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    mass = torch.rand(scores.shape, generator=generator)
    loss = gate_divergence(blocks, tables, GATE, call, mass)
    total, count = torch.zeros((), dtype=torch.float64), 0
    text = [
        any(not 0 <= t - layout.latent_start < layout.num_latent for t in part)
        for part in (rows.tolist()[i : i + 32] for i in range(0, layout.seq_len, 32))
    ]
    free = [j for j, is_text in enumerate(text) if not is_text]
    for h, i in product(range(2), range(len(text))):
        if not text[i]:
            target = mass[0, h, i, free].double() / mass[0, h, i, free].double().sum()
            total = total + (target * (target.log() - wanted[0, h, i, free].log_softmax(-1))).sum()
            count += 1
    assert abs(float(loss) - float(total / count)) <= 1e-5 * float(total / count)
    grads = torch.autograd.grad(loss, list(gate.parameters()))
    for grad, want in zip(grads, torch.autograd.grad(total / count, twins)):
        assert (grad - want).abs().max() <= 2e-5 * want.abs().max()


def plain_and_parts(q, k, v, rows, block, key_mask, kind):
    """Blocks, their visible keys, and the logits of means, in another dtype."""
    batch, seq_len, heads, dim = q.shape
    blocks = [rows[i : i + block] for i in range(0, seq_len, block)]
    seen = [[[t for t in part if key_mask is None or key_mask[b, t]] for part in blocks] for b in range(batch)]

    def mean(x, tokens, b, h):
        return x[b, tokens, h].to(kind).mean(0) if tokens else torch.zeros(dim, dtype=kind)

    pairs = list(product(range(batch), range(heads), range(len(blocks)), range(len(blocks))))
    q_mean = {(b, h, i): mean(q, blocks[i], b, h) for b, h, i, _ in pairs}
    k_mean, v_mean = ({(b, h, j): mean(x, seen[b][j], b, h) for b, h, _, j in pairs} for x in (k, v))
    return blocks, seen, pairs, q_mean, k_mean, v_mean


def low_rank(gate, q, k, v, layout, rows, block, key_mask, kind):
    blocks, _, pairs, q_mean, k_mean, _ = plain_and_parts(q, k, v, rows, block, key_mask, kind)
    down, up = gate
    _, height, width = layout.grid

    def waves(tokens):
        on = [t - layout.latent_start for t in tokens if 0 <= t - layout.latent_start < layout.num_latent]
        axes = [[t // (height * width), t // width % height, t % width] for t in on]
        place = [sum(c) / len(axes) for c in zip(*axes)] if axes else [0.0] * 3
        x, y, z = (p / max(1, n - 1) for p, n in zip(place, layout.grid))
        cos = lambda n, at: math.cos(math.pi * n * at)  # noqa: E731
        return torch.tensor([cos(a, x) * cos(b, y) * cos(c, z) for a, b, c in product(range(3), repeat=3)], dtype=kind)

    known = [waves(part) for part in blocks]
    scale, found = q.shape[-1] ** -0.5, {}
    for b, h, i, j in pairs:
        mixtures = [sum((down[h, r] @ known[n]) * k_mean[b, h, n] for n in range(len(blocks))) / len(blocks)
                    for r in range(down.shape[1])]  # fmt: skip
        asked = torch.stack([scale * q_mean[b, h, i] @ mixture for mixture in mixtures]).softmax(0)
        added = sum(asked[r] * (up[h, r] @ known[j]) for r in range(down.shape[1]))
        found[b, h, i, j] = scale * q_mean[b, h, i] @ k_mean[b, h, j] + added
    return found


def linear(gate, q, k, v, layout, rows, block, key_mask, kind):
    blocks, seen, pairs, q_mean, k_mean, _ = plain_and_parts(q, k, v, rows, block, key_mask, kind)
    features_q, features_k, gain = gate
    scale, found = q.shape[-1] ** -0.5, {}
    for b, h, i, j in pairs:
        of_q = torch.stack([(q[b, t, h].to(kind) @ features_q[h]).softmax(0) for t in blocks[i]]).mean(0)
        of_k = [(k[b, t, h].to(kind) @ features_k[h]).softmax(0) for t in seen[b][j]]
        told = of_q @ torch.stack(of_k).mean(0) if of_k else torch.zeros((), dtype=kind)
        found[b, h, i, j] = scale * q_mean[b, h, i] @ k_mean[b, h, j] + gain[h] * told.clamp_min(1e-8).log()
    return found


def values(gate, q, k, v, layout, rows, block, key_mask, kind):
    _, _, pairs, q_mean, k_mean, v_mean = plain_and_parts(q, k, v, rows, block, key_mask, kind)
    weight, decay = gate
    scale, found = q.shape[-1] ** -0.5, {}
    for b, h, i, j in pairs:
        heard = torch.log1p((v_mean[b, h, j] @ weight[h]).exp())
        found[b, h, i, j] = scale * q_mean[b, h, i] @ k_mean[b, h, j] + (decay[h] * heard).exp() - 1
    return found


@pytest.mark.parametrize("form", [low_rank, linear, values], ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["alone", "text last"])
def test_forms_against_their_equations(form, name):
    """Scores and gradients, with keys that are hidden, in float64, pair by pair."""
    layout, dim = LAYOUTS[name], 16
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, layout.seq_len, 2, dim, generator=generator) for _ in range(3))
    key_mask = None
    if name == "text last":
        key_mask = torch.ones(1, layout.seq_len, dtype=torch.bool)
        key_mask[0, layout.seq_len - 40 :] = False
    rows = SMALL_TILES.rows(layout, q.device)
    blocks, select = SequenceBlocks(layout, rows, 32, 32, q.device), replace(GATE, rank=6, form=form.__name__)
    call = call_of(q, k, v, key_mask=key_mask)
    gate = call.router = select.build(2, dim)
    with torch.no_grad():
        untrained = select.scores(blocks, select.prepare(blocks), call)
        for parameter in gate.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    scores = select.scores(blocks, select.prepare(blocks), call)
    twins = [parameter.detach().double().requires_grad_() for parameter in gate.parameters()]
    found = form(twins, q, k, v, layout, rows.tolist(), 32, key_mask, torch.float64)
    wanted = torch.stack(list(found.values())).view(scores.shape)
    assert (scores - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (scores - untrained).abs().max() > 0.05
    weight = torch.randn(scores.shape, generator=generator)
    grads = torch.autograd.grad((scores * weight).sum(), list(gate.parameters()))
    for grad, want in zip(grads, torch.autograd.grad((wanted * weight).sum(), twins)):
        assert (grad - want).abs().max() <= 5e-5 * want.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_learns_and_comes_back_from_its_adapter(form, tmp_path):
    pipe, sample, level = sharp_pipe(), samples(1)[0], torch.tensor([0.5])
    recipe = replace(SEER, select=replace(GATE, form=form))
    noise = torch.randn(sample.latents.shape, generator=torch.Generator().manual_seed(3))
    batch = NoisyBatch(
        (sample.latents + noise) / 2, noise, level * 1000, sample.condition, level, lambda level: level * 1000
    )
    handle, found = dit_accel.patch(pipe, recipe), []
    gates = {n: p for n, p in pipe.transformer.named_parameters() if "dit_accel_router" in n}
    optimizer = torch.optim.Adam(gates.values(), lr=1e-2)
    for _ in range(15):
        with losses(pipe.transformer, handle, OBJECTIVES["gate"], batch, handle.disabled) as terms:
            found.append(float(terms.total.detach()))
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
    assert found[-1] < 0.995 * found[0]
    folder, learned = dit_accel.save_adapter(pipe, tmp_path), {n: p.detach().clone() for n, p in gates.items()}
    handle.remove()
    with dit_accel.load_adapter(pipe, folder) as handle:
        assert handle.recipe.select.form == form
        assert all(torch.equal(dict(pipe.transformer.named_parameters())[n], p) for n, p in learned.items())
    other = replace(recipe, select=replace(recipe.select, form="values" if form != "values" else "linear"))
    with pytest.raises(ValueError, match=r"select\.form is"):
        dit_accel.load_adapter(pipe, folder, recipe=other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["wan", "hunyuan"])
def test_an_untrained_gate_chooses_as_pooled_scores_do(family, form):
    tiny = TINY[family]
    pipe = tiny.build()
    zero = {"pooled": "project_q", "low_rank": "up", "linear": "gain", "values": "decay"}[form]
    with dit_accel.patch(pipe, replace(SEER, select=replace(GATE, form=form))) as handle:
        out = tiny.run(pipe, steps=2)
        assert handle.summary().density < 0.9
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith(f"router.{zero}"):
                parameter.data.normal_(std=3.0)
        other = tiny.run(pipe, steps=2)
    with dit_accel.patch(pipe, replace(SEER, select=Pooled(density=0.3, block=(32, 32)))):
        assert torch.equal(tiny.run(pipe, steps=2), out)
    assert not torch.equal(out, other)


def sharp_pipe():
    """A pipeline whose heads prefer some blocks, or a gate has nothing to learn."""
    pipe = tiny_pipe()
    torch.manual_seed(5)
    for block in pipe.transformer.blocks:
        block.attn1.norm_q.weight.data *= 4
        block.attn1.norm_k.weight.data *= 4
    return pipe


def test_training_brings_the_gate_to_the_exact_mass_and_leaves_the_model_alone(tmp_path):
    pipe = sharp_pipe()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    config = FinetuneConfig(
        steps=30, learning_rate=2e-2, batch_size=2, train="learned", objective=OBJECTIVES["gate"], evaluate_samples=1
    )
    result = finetune(pipe, SEER, samples(), tmp_path, config)
    found = [entry["gate"] for entry in result.curves.steps]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    own = pipe.transformer.state_dict()
    assert all(torch.equal(own[name], value) for name, value in before.items())
    gates = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters() if ".dit_accel_router." in n}
    assert len(gates) == 4
    wanted = TINY["wan"].run(pipe, steps=2)
    result.handle.remove()
    assert not any("dit_accel" in name for name, _ in pipe.transformer.named_parameters())
    with dit_accel.load_adapter(pipe, tmp_path / "adapter") as handle:
        assert handle.recipe == SEER
        loaded = dict(pipe.transformer.named_parameters())
        assert all(torch.equal(loaded[name], value) for name, value in gates.items())
        assert torch.equal(TINY["wan"].run(pipe, steps=2), wanted)


def test_the_loss_is_of_the_dense_models_own_trajectory():
    """Whatever the gate chooses, later layers see what they would without a patch."""
    pipe = sharp_pipe()
    sample = samples(1)[0]
    level = torch.tensor([0.5])
    batch = NoisyBatch(sample.latents, sample.latents, level * 1000, sample.condition, level, lambda x: x * 1000)

    def terms(density: float) -> torch.Tensor:
        recipe = SEER.with_fields({"select.density": density})
        with (
            dit_accel.patch(pipe, recipe) as handle,
            torch.no_grad(),
            losses(pipe.transformer, handle, OBJECTIVES["gate"], batch, handle.disabled) as found,
        ):
            return found.total

    assert torch.equal(terms(0.05), terms(1.0))
    assert math.isfinite(float(terms(0.3)))


def test_what_cannot_be_says_so(tmp_path):
    with pytest.raises(ValueError, match="form must be one of pooled, low_rank, linear, values, got 'best'"):
        Learned(form="best")
    with pytest.raises(ValueError, match="multiple of 6, got 8"):
        Learned(rank=8)
    with pytest.raises(ValueError, match=r"select\.density must lie in"):
        Learned(density=0.0)
    with pytest.raises(ValueError, match="gate goes alone"):
        Objective(flow=1.0, gate=1.0)
    with pytest.raises(ValueError, match="trains gates alone, with train = 'learned', got 'attention'"):
        FinetuneConfig(objective=OBJECTIVES["gate"])
    with pytest.raises(ValueError, match="a calibration does not know"):
        refuse_calibration(SEER, None)
    config = FinetuneConfig(train="learned", objective=OBJECTIVES["gate"])
    pooled = replace(SEER, select=Pooled(block=(32, 32)))
    with pytest.raises(ValueError, match=r"objective\.gate trains a learned selection, got Pooled"):
        finetune(tiny_pipe(), pooled, samples(), tmp_path, config)
    pipe = tiny_pipe()
    with (
        dit_accel.patch(pipe, pooled) as handle,
        pytest.raises(ValueError, match="for a learned selection"),
        gate_losses(handle),
    ):
        pass


def test_checkpointing_is_refused_with_gates():
    with pytest.raises(ValueError, match=r"gradient_checkpointing is of no use with objective\.gate"):
        FinetuneConfig(objective=OBJECTIVES["gate"], train="learned", gradient_checkpointing=True)
