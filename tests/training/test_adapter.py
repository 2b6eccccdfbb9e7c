"""Adapters: what is saved comes back, into the right model only, and out again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dit_accel
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from dit_accel.training.lora import add_lora
from tests.tiny import TINY
from tests.training.samples import SLA, samples, tiny_pipe

FAST = FinetuneConfig(steps=3, learning_rate=1e-2, evaluate_samples=1)


def weights(pipe) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in pipe.transformer.named_parameters()}


def generate(pipe) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("none", {"train": "learned"}), ("delta", {}), ("lora", {"lora_rank": 4}), ("delta", {"ema_decay": 0.5})],
    ids=["learned", "delta", "lora", "averaged"],
)
def test_round_trip_through_a_fresh_pipeline(kind, changes, tmp_path):
    trained = tiny_pipe()
    result = finetune(trained, SLA, samples(), tmp_path, replace(FAST, **changes))
    card = json.loads((result.adapter / "adapter.json").read_text())
    assert card["backbone"] == kind
    assert card["training"]["steps"] == 3
    assert dit_accel.Recipe.from_dict(card["recipe"]) == SLA
    wanted = generate(trained)

    fresh = tiny_pipe()
    before, objects = weights(fresh), {n: id(p) for n, p in fresh.transformer.named_parameters()}
    plain = generate(fresh)
    handle = dit_accel.load_adapter(fresh, result.adapter)
    # A delta is the difference of two float32 values, added again: one rounding of each weight.
    torch.testing.assert_close(generate(fresh), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.equal(wanted, plain)
    handle.remove()
    assert {n: id(p) for n, p in fresh.transformer.named_parameters()} == objects
    assert all(torch.equal(value, before[name]) for name, value in weights(fresh).items())
    assert torch.equal(generate(fresh), plain)


def test_full_weights_and_half_precision(tmp_path):
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, SLA):
        name = "blocks.0.attn1.to_q.weight"
        parameter = dict(pipe.transformer.named_parameters())[name]
        parameter.data += 0.25
        wanted = parameter.detach().clone()
        dit_accel.save_adapter(pipe, tmp_path, backbone="full", trained=[name], dtype=torch.float16)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert stored[f"transformer/full/{name}"].dtype == torch.float16
    assert stored["transformer/learned/blocks.0.attn1.dit_accel.weight"].dtype == torch.float32
    fresh = tiny_pipe()
    with dit_accel.load_adapter(fresh, tmp_path):
        loaded = dict(fresh.transformer.named_parameters())[name]
        assert torch.equal(loaded, wanted.half().float())


def test_an_adapter_fits_the_same_weights_in_another_dtype(tmp_path):
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, SLA):
        dit_accel.save_adapter(pipe, tmp_path)
    half = tiny_pipe()
    half.transformer.to(torch.bfloat16)
    dit_accel.load_adapter(half, tmp_path).remove()


def test_two_transformers_each_get_their_own(tmp_path):
    pipe = TINY["wan2.2"].build()
    with dit_accel.patch(pipe, SLA):
        pipe.transformer.blocks[0].attn1.dit_accel.bias.data.fill_(1.0)
        pipe.transformer_2.blocks[0].attn1.dit_accel.bias.data.fill_(2.0)
        dit_accel.save_adapter(pipe, tmp_path)
    fresh = TINY["wan2.2"].build()
    with dit_accel.load_adapter(fresh, tmp_path):
        assert (fresh.transformer.blocks[0].attn1.dit_accel.bias == 1.0).all()
        assert (fresh.transformer_2.blocks[0].attn1.dit_accel.bias == 2.0).all()
    with pytest.raises(ValueError, match=r"for the transformers transformer, transformer_2"):
        dit_accel.load_adapter(tiny_pipe(), tmp_path)


def _saved(tmp_path, pipe=None):
    pipe = pipe or tiny_pipe()
    with dit_accel.patch(pipe, SLA):
        return dit_accel.save_adapter(pipe, tmp_path)


def _other_weights():
    pipe = tiny_pipe()
    for parameter in pipe.transformer.parameters():
        parameter.data *= 1.5
    return pipe


def _reshaped(**changes):
    from tests.tiny import _wan_transformer

    pipe = tiny_pipe()
    pipe.transformer = _wan_transformer(2, **changes)
    return pipe


REFUSED = {
    "another class": (lambda: TINY["hunyuan"].build(), "for a transformer WanTransformer3DModel"),
    "heads": (lambda: _reshaped(num_attention_heads=4, attention_head_dim=12), "for heads 2, the model has 4"),
    "head size": (lambda: _reshaped(attention_head_dim=18), "for head dim 12, the model has 18"),
    "layers": (lambda: tiny_pipe(layers=3), "for self-attention layers 2, the model has 3"),
    "config": (lambda: _reshaped(ffn_dim=64), "model with ffn_dim = 32, this one has 64"),
    "weights": (_other_weights, "for other weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_base_is_refused_by_name_and_left_alone(name, tmp_path):
    build, message = REFUSED[name]
    folder = _saved(tmp_path)
    pipe = build()
    before = weights(pipe)
    with pytest.raises(ValueError, match=message):
        dit_accel.load_adapter(pipe, folder)
    assert weights(pipe).keys() == before.keys()
    with pytest.raises(ValueError, match="is not patched"):
        dit_accel.unpatch(pipe)


def test_another_recipe_is_refused_by_name(tmp_path):
    folder = _saved(tmp_path)
    pipe = tiny_pipe()
    with dit_accel.patch(pipe, SLA.with_fields({"select.block": (64, 64)})) as handle:
        with pytest.raises(ValueError, match=r"another recipe: select\.block is \(32, 32\) there, \(64, 64\) here"):
            dit_accel.load_adapter(pipe, folder)
        assert handle.active
    with dit_accel.patch(pipe, SLA):
        dit_accel.load_adapter(pipe, folder)


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no adapter or checkpoint at"):
        dit_accel.load_adapter(tiny_pipe(), tmp_path / "nowhere")
    folder = _saved(tmp_path)
    (folder / "adapter.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="holds no readable adapter"):
        dit_accel.load_adapter(tiny_pipe(), folder)


def test_bad_arguments(tmp_path):
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match="is not patched"):
        dit_accel.save_adapter(pipe, tmp_path)
    with dit_accel.patch(pipe, SLA):
        with pytest.raises(ValueError, match="backbone must be one of none, full"):
            dit_accel.save_adapter(pipe, tmp_path, backbone="half")
        with pytest.raises(ValueError, match="needs LoRA layers"):
            dit_accel.save_adapter(pipe, tmp_path, backbone="lora")
        with pytest.raises(ValueError, match="has no parameter nothing"):
            dit_accel.save_adapter(pipe, tmp_path, backbone="full", trained=["nothing"])
        with pytest.raises(ValueError, match="needs the base values"):
            dit_accel.save_adapter(pipe, tmp_path, backbone="delta", trained=["proj_out.weight"])


def test_a_users_own_lora_stays(tmp_path):
    """Loaded beside a LoRA that was there, and removed without it."""
    folder = finetune(tiny_pipe(), SLA, samples(), tmp_path, replace(FAST, lora_rank=2)).adapter
    pipe = tiny_pipe()
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["blocks.0.attn1.to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, adapter_name="mine")
    plain = generate(pipe)
    handle = dit_accel.load_adapter(pipe, folder)
    assert set(pipe.transformer.active_adapters()) == {"mine", "dit_accel_lora"}
    handle.remove()
    assert list(pipe.transformer.peft_config) == ["mine"]
    assert torch.equal(generate(pipe), plain)


def test_add_lora_undoes_itself():
    pipe = tiny_pipe()
    names = set(pipe.transformer.state_dict())
    undo = add_lora(pipe.transformer, ["blocks.0.attn1.to_q"], 2, 2.0)
    assert any("lora_A" in name for name in pipe.transformer.state_dict())
    undo()
    assert set(pipe.transformer.state_dict()) == names
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_integers_bring_a_delta_back_to_half_a_step_of_its_scale(tmp_path):
    """Every row has a scale of its own; one row here is a thousand times as large as the others."""
    pipe = tiny_pipe()
    base = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    with dit_accel.patch(pipe, SLA):
        for name, parameter in pipe.transformer.named_parameters():
            if name in base:
                change = 1e-3 * torch.randn(parameter.shape, generator=generator)
                change[0] *= 1000
                parameter.data += change
        tuned = {n: p.detach().clone() for n, p in pipe.transformer.named_parameters()}
        for kind, dtype in (("int8", torch.int8), ("half", torch.bfloat16)):
            dit_accel.save_adapter(pipe, tmp_path / kind, backbone="delta", trained=base, base=base, dtype=dtype)
    fresh = tiny_pipe()
    handle = dit_accel.load_adapter(fresh, tmp_path / "int8")
    for name, parameter in fresh.transformer.named_parameters():
        wanted = tuned[name]
        if name not in base or wanted.dim() == 1:
            torch.testing.assert_close(parameter, wanted, rtol=0, atol=1e-6)
            continue
        step = (wanted - base[name]).flatten(1).abs().amax(1) / 127
        error = (parameter - wanted).flatten(1).abs().amax(1)
        assert (error <= step / 2 + 1e-6).all(), name
        assert (error > step / 8).any(), "nothing was rounded, the case shows nothing"
    handle.remove()
    assert all(torch.equal(p, base[n]) for n, p in fresh.transformer.named_parameters())
    kinds = {kind: load_file(tmp_path / kind / "adapter.safetensors") for kind in ("int8", "half")}
    size = {kind: sum(t.nbytes for n, t in tensors.items() if "blocks.0.ffn" in n) for kind, tensors in kinds.items()}
    assert size["int8"] < 0.75 * size["half"]
    with dit_accel.patch(pipe, SLA), pytest.raises(ValueError, match="int8 is for backbone 'delta', got 'full'"):
        dit_accel.save_adapter(pipe, tmp_path / "c", backbone="full", trained=base, dtype=torch.int8)
