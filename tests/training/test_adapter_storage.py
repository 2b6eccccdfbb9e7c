"""Adapters and weights that are stored otherwise: offloaded, in eight bits, fused; before and after the loading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import dit_accel
from dit_accel.patches.weights import weights_of
from dit_accel.training.adapter_load import LoadPlan, rounded
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from dit_accel.training.lora import add_lora
from tests.patches.test_fingerprint import FORMS, groups
from tests.tiny import TINY
from tests.training.samples import SLA, samples, tiny_pipe

CPU = torch.device("cpu")
FAST = FinetuneConfig(steps=3, learning_rate=1e-2, evaluate_samples=1)
KINDS = {"learned": {"train": "learned"}, "delta": {}, "lora": {"lora_rank": 4}}


class Adapter:
    """Saved, and what the pipelines with and without it generate."""

    def __init__(self, folder: Any, kind: str) -> None:
        pipe = tiny_pipe()
        self.kind = kind
        self.folder = finetune(pipe, SLA, samples(), folder, replace(FAST, **KINDS[kind])).adapter
        self.tuned = generate(pipe)
        self.base = generate(tiny_pipe())


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, tmp_path_factory) -> Adapter:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Adapter(tmp_path_factory.mktemp(request.param), request.param)


def generate(pipe: Any) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=2)


def stored(pipe: Any, form: str, folder: Any = None) -> Any:
    """The pipeline with its transformer in this form, on a CPU as on a device that it is offloaded from."""
    if form == "disk":
        accelerate.disk_offload(pipe.transformer, folder / "weights", execution_device=CPU)
    elif form == "groups on disk":
        groups("block_level", folder / "weights")(pipe.transformer)
    else:
        FORMS[form](pipe.transformer)
    kind = type(pipe)
    on_cpu = {"_execution_device": property(lambda self: CPU), "device": property(lambda self: CPU)}
    on_cpu["dtype"] = property(lambda self: torch.float32)
    pipe.__class__ = type(kind.__name__, (kind,), on_cpu)
    return pipe


OFFLOADED = ["sequential offload", "groups of blocks", "groups of leaves", "disk", "fused projections"]


@pytest.mark.parametrize("form", OFFLOADED)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_works_where_weights_are_offloaded_or_fused(form, when, adapter, tmp_path):
    """Nothing is rounded: the same output as elsewhere, and none of it left at the end."""
    if form == "fused projections" and adapter.kind == "lora":
        return  # diffusers computes with the fused projections alone
    pipe = tiny_pipe()
    if when == "before":
        stored(pipe, form, tmp_path)
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    if when == "after":
        stored(pipe, form, tmp_path)
    torch.testing.assert_close(generate(pipe), adapter.tuned, atol=1e-5, rtol=1e-4)
    handle.remove()
    torch.testing.assert_close(generate(pipe), adapter.base, atol=1e-6, rtol=1e-5)
    assert not any("dit_accel" in name for name, _ in pipe.transformer.named_parameters())


def test_groups_on_disk_take_what_changes_no_weight(adapter, tmp_path):
    pipe = stored(tiny_pipe(), "groups on disk", tmp_path)
    if adapter.kind == "delta":
        with pytest.raises(ValueError, match=r"which is offloaded to disk in groups; load before that is enabled"):
            dit_accel.load_adapter(pipe, adapter.folder)
    else:
        with dit_accel.load_adapter(pipe, adapter.folder):
            torch.testing.assert_close(generate(pipe), adapter.tuned, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(generate(pipe), adapter.base, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", ["e4m3", "bf16"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_has_its_effect_on_rounded_weights(form, when, adapter):
    """Nearer to the tuned model, rounded, than to the one before the tuning."""

    def rounded_pipe() -> Any:
        return stored(tiny_pipe(), form)

    base = generate(rounded_pipe()).float()
    pipe = rounded_pipe() if when == "before" else tiny_pipe()
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    if when == "after":
        stored(pipe, form)
    got = generate(pipe).float()
    noise = (base - adapter.base).norm()
    assert (got - adapter.tuned).norm() < max(0.75 * (base - adapter.tuned).norm(), 1.5 * noise)
    assert not torch.equal(got, base)
    handle.remove()
    assert torch.equal(generate(pipe).float(), base)


def test_a_lora_beside_fused_projections_is_refused(adapter):
    pipe = stored(tiny_pipe(), "fused projections")
    if adapter.kind != "lora":
        return
    with pytest.raises(ValueError, match=r"is not computed with, .*; call unfuse_qkv_projections\(\) first"):
        dit_accel.load_adapter(pipe, adapter.folder)
    with pytest.raises(ValueError, match="is not patched"):
        dit_accel.unpatch(pipe)


def test_the_pipelines_device_and_dtype_may_change_meanwhile(adapter):
    pipe = tiny_pipe()
    base = {name: parameter.detach().clone() for name, parameter in pipe.transformer.named_parameters()}
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    pipe.to(torch.bfloat16)
    generate(pipe)
    handle.remove()
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, base[name].to(parameter.dtype)), name
        assert parameter.dtype == torch.bfloat16 or "norm" in name or "scale_shift" in name or "time_emb" in name


def test_model_offload(adapter):
    pipe = tiny_pipe()
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    pipe.transformer, hook = accelerate.cpu_offload_with_hook(pipe.transformer, CPU)
    torch.testing.assert_close(generate(pipe), adapter.tuned, atol=1e-5, rtol=1e-4)
    hook.offload()
    handle.remove()
    assert torch.equal(generate(pipe), adapter.base)


def with_users_lora(pipe: Any) -> Any:
    targets = ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2"]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="mine")
    generator = torch.Generator().manual_seed(8)
    for name, parameter in pipe.transformer.named_parameters():
        if ".mine." in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return pipe


STEPS = {
    "fused, loaded": ["fuse", "load", "check", "remove", "check base", "unfuse"],
    "fused, loaded, taken out": ["fuse", "load", "unfuse", "check", "remove"],
    "loaded, fused": ["load", "fuse", "check", "remove", "check base", "unfuse"],
    "loaded, fused, taken out": ["load", "fuse", "unfuse", "check", "remove"],
    "fused, loaded, offloaded": ["fuse", "load", "offload", "check", "remove", "check base"],
    "fused, offloaded, loaded": ["fuse", "offload", "load", "check", "remove", "check base"],
    "loaded, fused, in half": ["load", "fuse", "half", "remove"],
}


@pytest.mark.parametrize("order", STEPS)
def test_a_users_lora_may_be_fused_at_any_time(order, adapter):
    """With both it is one model, whichever is fused; without the adapter it is the user's, and unfuses to the first."""
    unfused = with_users_lora(tiny_pipe())
    base = generate(unfused)
    wanted = with_users_lora(tiny_pipe())
    dit_accel.load_adapter(wanted, adapter.folder)
    both = generate(wanted)
    assert not torch.allclose(both, base, atol=1e-3)
    pipe = with_users_lora(tiny_pipe())
    first = {name: weight.read().clone() for name, weight in weights_of(pipe.transformer).items()}
    close = {"atol": 1e-4, "rtol": 1e-3}
    handle, is_fused = None, False
    for step in STEPS[order]:
        if step == "fuse":
            pipe.transformer.fuse_lora()
            is_fused = True
        elif step == "unfuse":
            pipe.transformer.unfuse_lora()
            is_fused = False
        elif step == "load":
            handle = dit_accel.load_adapter(pipe, adapter.folder)
        elif step == "remove":
            handle.remove()
        elif step == "offload":
            stored(pipe, "sequential offload")
        elif step == "half":
            pipe.transformer.to(torch.bfloat16)
            close = {"atol": 2e-2, "rtol": 2e-2}
        else:
            torch.testing.assert_close(generate(pipe), both if step == "check" else base, atol=1e-4, rtol=1e-3)
        layers = [layer for layer in pipe.transformer.modules() if hasattr(layer, "merged_adapters")]
        assert all(("mine" in layer.merged_adapters) == ("mine" in layer.lora_A and is_fused) for layer in layers)
    assert list(pipe.transformer.peft_config) == ["mine"]
    if "half" not in STEPS[order]:
        torch.testing.assert_close(generate(pipe), base, atol=1e-4, rtol=1e-3)
    for name, weight in weights_of(pipe.transformer).items():
        change = weight.merged_change()
        value = weight.read().float() - (0.0 if change is None else change)
        torch.testing.assert_close(value, first[name].float(), **close, msg=name)


def test_layers_without_an_adapter_are_what_they_were():
    pipe = with_users_lora(tiny_pipe())
    names = [name for name, _ in pipe.transformer.named_parameters()]
    add_lora(pipe.transformer, ["blocks.1.attn1.to_k"], 2, 2)()
    assert [name for name, _ in pipe.transformer.named_parameters()] == names


def test_lora_layers_are_put_around_layers_not_into_other_loras():
    """What a search for linear layers finds: the wrapped one, and those of the LoRA."""
    pipe = with_users_lora(tiny_pipe())
    path = "blocks.0.attn1.to_q"
    found = [f"{path}.base_layer", f"{path}.lora_A.mine", f"{path}.lora_B.mine", "blocks.0.attn1.to_k"]
    add_lora(pipe.transformer, found, 2, 2)
    layers = {n.split(".lora_A.")[0] for n, _ in pipe.transformer.named_parameters() if ".lora_A.dit_accel" in n}
    assert layers == {path, "blocks.0.attn1.to_k"}


def test_disabled_loras_stay_disabled(adapter):
    pipe = with_users_lora(tiny_pipe())
    users = generate(pipe)
    pipe.transformer.disable_adapters()
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    torch.testing.assert_close(generate(pipe), adapter.tuned, atol=1e-5, rtol=1e-4)
    handle.remove()
    torch.testing.assert_close(generate(pipe), adapter.base, atol=1e-6, rtol=1e-5)
    pipe.transformer.enable_adapters()
    torch.testing.assert_close(generate(pipe), users, atol=1e-6, rtol=1e-5)


def test_a_lora_that_came_later_outlives_the_adapter(adapter):
    pipe = tiny_pipe()
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    with_users_lora(pipe)
    handle.remove()
    assert list(pipe.transformer.peft_config) == ["mine"]
    torch.testing.assert_close(generate(pipe), generate(with_users_lora(tiny_pipe())), atol=1e-5, rtol=1e-4)


def test_saving_from_an_offloaded_pipeline_is_saving_from_another(tmp_path):
    """Also a weight of a fused projection, and one beside a LoRA: names and values are the plain model's."""
    names = [f"blocks.0.attn1.to_{part}.weight" for part in "qkv"]
    found = {}
    for form in ("plain", "sequential offload", "disk", "fused projections", "LoRA"):
        pipe = stored(tiny_pipe(), form, tmp_path)
        with dit_accel.patch(pipe, SLA):
            model = pipe.transformer
            for weight in (weights_of(model)[name] for name in names):
                weight.write(weight.read() + 0.5)
            for n, parameter in model.named_parameters():
                if n.endswith("dit_accel.bias"):
                    parameter.data.fill_(2.0)
            trained = {"fused projections": ["blocks.0.attn1.to_qkv.weight"], "LoRA": []}.get(form, names)
            if form == "LoRA":
                trained = [n.replace(".weight", ".base_layer.weight") for n in names]
            dit_accel.save_adapter(pipe, tmp_path / form, backbone="full", trained=trained)
        found[form] = load_file(tmp_path / form / "adapter.safetensors")
        with dit_accel.load_adapter(tiny_pipe(), tmp_path / form):
            pass
    for form, tensors in found.items():
        assert tensors.keys() == found["plain"].keys(), form
        assert all(torch.equal(value, found["plain"][name]) for name, value in tensors.items()), form


def test_changes_smaller_than_a_step_of_eight_bits_are_kept_on_average():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        info = torch.finfo(dtype)
        for size in (0.7, 300.0, 0.01, info.smallest_normal, info.smallest_normal * info.eps * 1.5):
            base = torch.tensor(size).to(dtype).float()
            step = max(float(base) * info.eps / 2, info.smallest_normal * info.eps)
            value = torch.full((200, 200), float(base) + 0.2 * step)
            for sign in (1, -1):
                got = rounded(sign * value, dtype).float()
                assert abs(float((got - sign * base).mean()) - sign * 0.2 * step) < 0.02 * step
        numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        numbers = numbers[numbers.isfinite()]
        assert torch.equal(rounded(numbers, dtype).float(), numbers)
        assert rounded(torch.tensor([1e9]), dtype).float() == info.max
    assert torch.equal(rounded(torch.tensor([0.3]), torch.float16), torch.tensor([0.3]).half())


@pytest.mark.parametrize("patched", [True, False])
def test_a_load_that_fails_half_way_leaves_nothing(patched, adapter, monkeypatch):
    pipe = tiny_pipe()
    handle = dit_accel.patch(pipe, SLA) if patched else None
    for name, parameter in pipe.transformer.named_parameters():
        if "dit_accel" in name:
            parameter.data.fill_(0.125)
    before = {n: (id(p), p.detach().clone()) for n, p in pipe.transformer.named_parameters()}
    apply = LoadPlan.apply

    def fail_at_the_end(self, undo):
        apply(self, undo)
        raise MemoryError("no more")

    monkeypatch.setattr(LoadPlan, "apply", fail_at_the_end)
    with pytest.raises(MemoryError):
        dit_accel.load_adapter(pipe, adapter.folder)
    after = dict(pipe.transformer.named_parameters())
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1]), name
    if handle is not None:
        assert handle.active
        handle.remove()
    with pytest.raises(ValueError, match="is not patched"):
        dit_accel.unpatch(pipe)


def test_of_two_transformers_neither_is_changed_when_one_fails(tmp_path, monkeypatch):
    pipe = TINY["wan2.2"].build()
    with dit_accel.patch(pipe, SLA):
        for model in (pipe.transformer, pipe.transformer_2):
            model.blocks[0].attn1.dit_accel.bias.data.fill_(0.25)
        dit_accel.save_adapter(pipe, tmp_path)
    pipe = TINY["wan2.2"].build()
    apply, seen = LoadPlan.apply, []

    def fail_in_the_second(self, undo):
        seen.append(self)
        if len(seen) == 2:
            raise MemoryError("no more")
        apply(self, undo)

    monkeypatch.setattr(LoadPlan, "apply", fail_in_the_second)
    with dit_accel.patch(pipe, SLA):
        with pytest.raises(MemoryError):
            dit_accel.load_adapter(pipe, tmp_path)
        assert len(seen) == 2
        assert (pipe.transformer.blocks[0].attn1.dit_accel.bias == 0).all()


def test_swapped_experts_are_told_apart(tmp_path):
    pipe = TINY["wan2.2"].build()
    with dit_accel.patch(pipe, SLA):
        dit_accel.save_adapter(pipe, tmp_path)
    pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer
    with pytest.raises(ValueError, match="does not fit WanTransformer3DModel: it is for other weights"):
        dit_accel.load_adapter(pipe, tmp_path)


@pytest.mark.parametrize("order", ["taken out first", "removed first"])
def test_whole_weights_replace_what_a_fused_lora_was_added_to(order, tmp_path):
    """The LoRA stays fused into the new ones, and the old ones come back with or without it."""
    name, pipe = "blocks.0.attn1.to_q.weight", tiny_pipe()
    base = pipe.transformer.blocks[0].attn1.to_q.weight.detach().clone()
    pipe.transformer.blocks[0].attn1.to_q.weight.data = base.flip(0)
    with dit_accel.patch(pipe, SLA):
        options = {"backbone": "full", "trained": [name], "base": {name: base}}
        dit_accel.save_adapter(pipe, tmp_path, **options)
    pipe = with_users_lora(tiny_pipe())
    model, layer = pipe.transformer, pipe.transformer.blocks[0].attn1.to_q
    model.fuse_lora()
    change = weights_of(model)[name].merged_change()
    handle = dit_accel.load_adapter(pipe, tmp_path)
    torch.testing.assert_close(layer.base_layer.weight.detach(), base.flip(0) + change)
    if order == "taken out first":
        model.unfuse_lora()
        torch.testing.assert_close(layer.base_layer.weight.detach(), base.flip(0), atol=1e-6, rtol=1e-5)
        handle.remove()
    else:
        handle.remove()
        torch.testing.assert_close(layer.base_layer.weight.detach(), base + change, atol=1e-6, rtol=1e-5)
        model.unfuse_lora()
    torch.testing.assert_close(layer.base_layer.weight.detach(), base, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_pipelines_take_adapters_and_give_them_back(part, adapter, tmp_path):
    pipe = tiny_pipe()
    if part == "model":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        pipe.transformer.blocks[0] = torch.compile(pipe.transformer.blocks[0], backend="eager")
    handle = dit_accel.load_adapter(pipe, adapter.folder)
    torch.testing.assert_close(generate(pipe), adapter.tuned, atol=1e-5, rtol=1e-4)
    if adapter.kind != "delta":
        dit_accel.save_adapter(pipe, tmp_path, backbone="lora" if adapter.kind == "lora" else "none")
        saved, first = (load_file(folder / "adapter.safetensors") for folder in (tmp_path, adapter.folder))
        assert saved.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in saved.items())
    handle.remove()
    torch.testing.assert_close(generate(pipe), adapter.base, atol=1e-6, rtol=1e-5)
