"""Published checkpoints by their own names: synthetic ones of the real names and shapes, and our own trained ones
written as their authors write theirs, which must give the same output."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

import dit_accel
from dit_accel.training.published.formats import FewSteps, read_published
from dit_accel.training.published.names import diffusers_path, without_prefix
from dit_accel.training.published.scheduler import few_step_scheduler
from tests.tiny import TINY
from tests.training.samples import tiny_pipe

SLA = dit_accel.presets.sla(density=0.3, block=(32, 32), form="all_tokens").with_fields({"select.keep_own": False})

# As Wan's repository, and rCM and TurboDiffusion after it, name them: from ours, longest first.
WANS_NAMES = (
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn2.to_out.0", "cross_attn.o"),
    *((f"attn1.to_{x}", f"self_attn.{x}") for x in "qkv"),
    *((f"attn2.to_{x}", f"cross_attn.{x}") for x in "qkv"),
    ("attn1.norm", "self_attn.norm"),
    ("attn2.norm", "cross_attn.norm"),
    ("norm2", "norm3"),
    ("proj_out", "head.head"),
)


def wans_name(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in WANS_NAMES:
        if ours in name:
            return name.replace(ours, theirs)
    return name.replace("scale_shift_table", "modulation")


def trained(recipe, seed: int = 1):
    """A tiny pipeline with moved weights and learned parameters, and its output under the recipe."""
    pipe = tiny_pipe()
    generator = torch.Generator().manual_seed(seed)
    with dit_accel.patch(pipe, recipe):
        for parameter in pipe.transformer.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        out = TINY["wan"].run(pipe, steps=2)
        state = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    return state, out


def own_and_learned(state):
    learned = {name: value for name, value in state.items() if ".dit_accel." in name}
    return {name: value for name, value in state.items() if name not in learned}, learned


@pytest.mark.parametrize("gate", ["blocks.{}.to_gate_compress", "blocks.{}.attn1.to_gate_compress"])
def test_a_vsa_model_in_fastvideos_names_gives_the_same_output(gate, tmp_path):
    state, wanted = trained(dit_accel.presets.vsa(density=0.2))
    own, learned = own_and_learned(state)
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers"
    (folder / "transformer").mkdir(parents=True)
    gates = {f"{gate.format(name.split('.')[1])}.{name.rpartition('.')[2]}": value for name, value in learned.items()}
    save_file({**own, **gates}, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    pipe = tiny_pipe()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    plain, scheduler = TINY["wan"].run(pipe, steps=2), pipe.scheduler
    handle = dit_accel.load_adapter(pipe, folder)
    assert handle.recipe == dit_accel.presets.vsa(density=0.2)
    assert pipe.scheduler.config.few_step_sigmas == (1.0, 0.757, 0.522)
    assert "3 steps" in " ".join(handle.changes)
    with pytest.raises(ValueError, match="distilled to 3 steps, give num_inference_steps=3, got 2"):
        TINY["wan"].run(pipe, steps=2)
    assert torch.isfinite(TINY["wan"].run(pipe, steps=3)).all()
    pipe.scheduler = scheduler
    assert torch.equal(TINY["wan"].run(pipe, steps=2), wanted)
    handle.remove()
    assert pipe.scheduler is scheduler
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(TINY["wan"].run(pipe, steps=2), plain)


@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_sla_model_in_turbodiffusions_names_gives_the_same_output(prefix, tmp_path):
    recipe = dit_accel.presets.sla(density=0.1, form="all_tokens", block=(128, 64)).with_fields(
        {"select.keep_own": False}
    )
    state, wanted = trained(recipe)
    own, learned = own_and_learned(state)
    state = {prefix + wans_name(name): value for name, value in own.items()}
    kernel = state[f"{prefix}patch_embedding.weight"]
    state[f"{prefix}patch_embedding.weight"] = kernel.flatten(1)  # a linear layer there
    for name, value in learned.items():
        inner = "self_attn.attn_op.local_attn.proj_l"
        state[prefix + name.replace("attn1.dit_accel", inner)] = value
    path = tmp_path / "TurboWan2.1-T2V-1.3B-480P.pth"
    torch.save({"state_dict": state} if prefix else state, path)
    pipe = tiny_pipe()
    scheduler = pipe.scheduler
    handle = dit_accel.load_adapter(pipe, path)
    assert handle.recipe == recipe
    times = torch.tensor([math.atan(80), 1.5, 1.4, 1.0], dtype=torch.float64)
    sigmas = times.sin() / (times.sin() + times.cos())
    assert torch.tensor(pipe.scheduler.config.few_step_sigmas).sub(sigmas).abs().max() < 1e-5
    pipe.scheduler = scheduler
    assert torch.equal(TINY["wan"].run(pipe, steps=2), wanted)


def test_projections_alone_and_a_gates_lora():
    alone = {
        f"blocks.{n}.attn1.attn_impl.proj_l.{leaf}": torch.zeros(3) for n in range(2) for leaf in ("weight", "bias")
    }
    found = read_published(alone, "sla.safetensors")
    assert found.format == "SLA"
    assert set(found.learned) == {"blocks.0.attn1", "blocks.1.attn1"}
    down, up = torch.randn(4, 32), torch.randn(32, 4)
    state = {"blocks.0.to_gate_compress.lora_A.weight": down, "blocks.0.to_gate_compress.lora_B.weight": up}
    found = read_published(state, "fastwan-lora.safetensors")
    assert found.recipe == dit_accel.presets.vsa(density=0.2)
    assert not found.lora
    torch.testing.assert_close(found.learned["blocks.0.attn1"]["weight"], up @ down)


def lora_state(model, generator, rank=4):
    """A LoRA of all projections of a Wan model as LightX2V writes it, and the weights that it makes."""
    state, wanted = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in f".{name}":
            r = rank if "to_q" in name else rank // 2  # ranks may differ
            down = torch.randn(r, module.in_features, generator=generator) * 0.1
            up = torch.randn(module.out_features, r, generator=generator) * 0.1
            bias = torch.randn(module.out_features, generator=generator) * 0.1
            path = f"diffusion_model.{wans_name(name)}"
            state |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up, f"{path}.diff_b": bias}
            scale = 1.0
            if "to_k" in name:
                state[f"{path}.alpha"] = torch.tensor(1.0)
                scale = 1.0 / r
            wanted[f"{name}.weight"] = module.weight.detach() + scale * up @ down
            wanted[f"{name}.bias"] = module.bias.detach() + bias
    return state, wanted


def test_a_lora_in_wans_names_changes_the_model_as_its_product_does(tmp_path):
    pipe, twin = tiny_pipe(), tiny_pipe()
    state, wanted = lora_state(twin.transformer, torch.Generator().manual_seed(3))
    path = tmp_path / "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
    save_file(state, path)
    for name, value in wanted.items():
        twin.transformer.get_parameter(name).data.copy_(value)
    recipe = dit_accel.presets.pooled(density=0.5, dense_fraction=0.0).with_fields({"select.block": (32, 32)})
    with dit_accel.patch(twin, recipe):
        expected = TINY["wan"].run(twin, steps=2)
    scheduler, plain = pipe.scheduler, TINY["wan"].run(pipe, steps=2)
    handle = dit_accel.load_adapter(pipe, path, recipe=recipe)
    assert handle.recipe == recipe
    # Steps 1000, 750, 500 and 250 of 1,000, shifted by 5, by Euler's rule.
    assert pipe.scheduler.config.few_step_sigmas == pytest.approx((1.0, 15 / 16, 5 / 6, 0.625))
    assert not pipe.scheduler.config.stochastic_sampling
    pipe.scheduler = scheduler
    # The product is added to the output instead of the weight: another order of a few dozen float32 roundings.
    torch.testing.assert_close(TINY["wan"].run(pipe, steps=2), expected, atol=2e-5, rtol=1e-4)
    handle.remove()
    assert torch.equal(TINY["wan"].run(pipe, steps=2), plain)


def test_few_steps_are_the_authors_steps():
    """FastVideo's rule, by hand: to the clean estimate, then noise to the next level; Euler's without new noise."""
    for renoise in (True, False):
        scheduler = few_step_scheduler(FewSteps((1.0, 0.757, 0.522), renoise))
        scheduler.set_timesteps(3)
        assert torch.equal(scheduler.timesteps, torch.tensor([1.0, 0.757, 0.522]) * 1000)
        sample, velocity = torch.randn(2, 5), torch.randn(2, 5)
        noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(4))
        found = scheduler.step(
            velocity, scheduler.timesteps[0], sample, generator=torch.Generator().manual_seed(4), return_dict=False
        )[0]
        clean = sample - velocity
        wanted = (1 - 0.757) * clean + 0.757 * noise if renoise else sample - (1 - 0.757) * velocity
        torch.testing.assert_close(found, wanted)


LIGHTX2V = (1.0, 15 / 16, 5 / 6, 0.625)
RCM = (0.98765, 0.93378, 0.85290, 0.60898)
LORA_FILES = {
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": (LIGHTX2V, False),
    "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors": (LIGHTX2V, False),
    "Wan2_1-T2V-14B_rCM_lora_rank_32.safetensors": (RCM, True),
    "Wan21_T2V_14B_MoviiGen_lora_rank32_fp16.safetensors": None,
    "wan_arcmotion_lora.safetensors": None,
}


@pytest.mark.parametrize("name", LORA_FILES)
def test_a_lora_of_the_real_sizes_and_its_steps(name):
    """A block of Wan 2.1 14B, 5,120 and 13,824 features wide, in the names and the rank of the published files."""
    sizes = {f"{attn}.{x}": (5120, 5120) for attn in ("self_attn", "cross_attn") for x in "qkvo"}
    sizes |= {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824)}
    state = {"diffusion_model.blocks.7.self_attn.norm_q.diff": torch.zeros(5120)}
    for path, (rows, columns) in sizes.items():
        state[f"diffusion_model.blocks.7.{path}.lora_down.weight"] = torch.zeros(32, columns)
        state[f"diffusion_model.blocks.7.{path}.lora_up.weight"] = torch.zeros(rows, 32)
        state[f"diffusion_model.blocks.7.{path}.diff_b"] = torch.zeros(rows)
    found = read_published(state, name)
    assert found.format == "a LoRA"
    assert set(found.lora) == {
        *(f"blocks.7.attn{n}.{x}" for n in (1, 2) for x in ("to_q", "to_k", "to_v", "to_out.0")),
        "blocks.7.ffn.net.0.proj",
        "blocks.7.ffn.net.2",
    }
    down, up = found.lora["blocks.7.ffn.net.2"]
    assert (down.shape, up.shape) == ((32, 13824), (5120, 32))
    assert found.added["blocks.7.ffn.net.0.proj.bias"].shape == (13824,)
    assert found.added["blocks.7.attn1.norm_q.weight"].shape == (5120,)
    steps = LORA_FILES[name]
    assert (found.steps is None) == (steps is None)
    if steps is not None:
        assert found.steps.sigmas == pytest.approx(steps[0])
        assert found.steps.renoise == steps[1]


def test_a_whole_model_of_rcm_brings_its_steps():
    state = {"net.blocks.0.self_attn.q.weight": torch.zeros(1536, 1536)}
    assert read_published(state, "rCM_Wan2.1_T2V_1.3B_480p.pt").steps == FewSteps(RCM, renoise=True)
    assert read_published(state, "Wan2.1_T2V_1.3B.pt").steps is None


def test_names_of_the_three_repositories():
    for theirs, ours in {
        "net.blocks.3.self_attn.attn_op.local_attn.proj_l": "blocks.3.attn1.proj_l",
        "blocks.3.attn1.attn_impl.proj_l": "blocks.3.attn1.proj_l",
        "blocks.3.to_gate_compress": "blocks.3.attn1.to_gate_compress",
        "blocks.3.to_out": "blocks.3.attn1.to_out.0",
        "blocks.3.attn2.to_out": "blocks.3.attn2.to_out.0",
        "blocks.3.cross_attn.k_img": "blocks.3.attn2.add_k_proj",
        "blocks.3.ffn.fc_in": "blocks.3.ffn.net.0.proj",
        "blocks.3.modulation": "blocks.3.scale_shift_table",
        "blocks.3.norm3": "blocks.3.norm2",
        "head.modulation": "scale_shift_table",
        "diffusion_model.img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "transformer_blocks.1.attn.to_q": "transformer_blocks.1.attn.to_q",
        "blocks.3.attn1.to_out.0": "blocks.3.attn1.to_out.0",
        "blocks.3.norm2": "blocks.3.norm2",
    }.items():
        assert diffusers_path(without_prefix(theirs)) == ours


REFUSED = {
    "a gate of another width": (
        lambda _model: {
            f"blocks.{n}.to_gate_compress.{leaf}": torch.zeros(*shape)
            for n in range(2)
            for leaf, shape in (("weight", (24, 16)), ("bias", (24,)))
        },
        r"the weight of blocks.0.attn1 has shape \(24, 16\), the model takes",
    ),
    "gates of more layers": (
        lambda _model: {
            f"blocks.{n}.to_gate_compress.{leaf}": torch.zeros(*shape)
            for n in range(3)
            for leaf, shape in (("weight", (24, 24)), ("bias", (24,)))
        },
        "the attention blocks.2.attn1 is in the checkpoint alone",
    ),
    "gates without a bias": (
        lambda _model: {"blocks.0.attn.to_gate_compress.weight": torch.zeros(24, 24)},
        "VSA gates without a bias, as MiniMax-H3's",
    ),
    "half a LoRA": (
        lambda _model: {"blocks.0.self_attn.q.lora_down.weight": torch.zeros(4, 32)},
        r"holds only half of the LoRA of blocks.0.attn1.to_q",
    ),
    "a LoRA of other layers": (
        lambda _model: {f"blocks.0.self_attn.z.lora_{half}.weight": torch.zeros(4, 4) for half in ("down", "up")},
        "the model has no linear layer blocks.0.attn1.z",
    ),
    "a LoRA and more": (
        lambda _model: {"a.lora_A.weight": torch.zeros(4, 4), "something": torch.zeros(1)},
        "looks like a LoRA, and holds something",
    ),
    "a part of a model": (
        lambda _model: {"blocks.0.attn1.to_q.weight": torch.zeros(4, 4)},
        "does not fit WanTransformer3DModel: it has no",
    ),
    "a model of another size": (
        lambda model: {name: p[..., :1].contiguous() for name, p in model.named_parameters()},
        "does not fit WanTransformer3DModel: it has .* of .*, the model one of",
    ),
    "a quantised model": (
        lambda _model: {"blocks.0.self_attn.q.int8_weight": torch.zeros(4, 4, dtype=torch.int8)},
        "is quantised .*give the checkpoint in half precision",
    ),
    "something else": (lambda _model: {"vae.encoder.weight": torch.zeros(2)}, "is of no known format: it holds vae"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_sentence(case, tmp_path):
    make, message = REFUSED[case]
    pipe = tiny_pipe()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    save_file(make(pipe.transformer), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        dit_accel.load_adapter(pipe, tmp_path / "model.safetensors")
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).endswith(".")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    with pytest.raises(ValueError, match="is not patched"):
        dit_accel.unpatch(pipe)


def test_files_are_found_or_missed_in_a_sentence(tmp_path):
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match=r"There is no .*nobody/nothing here, and it cannot be had from the hub"):
        dit_accel.load_adapter(pipe, "nobody/nothing")
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"holds several checkpoints, give the path of one: a\.safetensors, b\."):
        dit_accel.load_adapter(pipe, tmp_path)
    (tmp_path / "c.pth").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"c\.pth cannot be read"):
        dit_accel.load_adapter(pipe, tmp_path / "c.pth")


def test_two_experts_are_named(tmp_path):
    pipe = TINY["wan2.2"].build()
    save_file(lora_state(pipe.transformer, torch.Generator().manual_seed(3))[0], tmp_path / "low_noise.safetensors")
    with pytest.raises(ValueError, match=r"does not say which of transformer, transformer_2 it is for"):
        dit_accel.load_adapter(pipe, tmp_path / "low_noise.safetensors")
    with dit_accel.load_adapter(pipe, tmp_path / "low_noise.safetensors", transformer="transformer_2"):
        assert any("lora" in name for name, _ in pipe.transformer_2.named_parameters())
        assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_an_adapter_runs_otherwise_than_it_was_trained_and_says_so(tmp_path):
    recipe = SLA.with_fields({"order": "tiles", "order.shape": (2, 4, 4)})
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, recipe):
        for name, parameter in pipe.transformer.named_parameters():
            if ".dit_accel." in name:
                parameter.data.fill_(0.1)
        dit_accel.save_adapter(pipe, tmp_path)
    other = recipe.with_fields({"select.density": 0.6, "precision": "int8", "schedule.dense_fraction": 0.5})
    handle = dit_accel.load_adapter(pipe, tmp_path, recipe=other)
    assert handle.recipe == other
    assert (pipe.transformer.blocks[0].attn1.dit_accel.bias == 0.1).all()
    text = str(handle.summary())
    flat = " ".join(text.split())
    assert "The adapter was trained with select.density = 0.3, and runs with 0.6." in flat
    assert "The adapter was trained with precision = 'model', and runs with 'int8'." in flat
    assert "The adapter was trained with schedule.dense_fraction = 0.0, and runs with 0.5." in flat
    handle.remove()
    with dit_accel.load_adapter(pipe, tmp_path) as handle:
        assert not handle.changes
    with pytest.raises(ValueError, match="another recipe: compensate is 'linear' there, 'none' here"):
        dit_accel.load_adapter(pipe, tmp_path, recipe=recipe.with_fields({"compensate": "none"}))
