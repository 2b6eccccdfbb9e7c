"""A LoRA that the user has loaded is part of the model: no training changes it, and none dies of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig

import dit_accel
from dit_accel.patches.learned import is_learned
from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from dit_accel.training.lora import LORA_NAME, lora_parameters
from dit_accel.training.objective import OBJECTIVES
from tests.tiny import TINY
from tests.training.samples import SLA, samples, tiny_pipe

CONFIG = FinetuneConfig(steps=2, learning_rate=1e-2)
WAYS = {
    "weights": CONFIG,
    "all": replace(CONFIG, train="all"),
    "lora": replace(CONFIG, lora_rank=2),
    "lora with a frozen teacher": replace(CONFIG, lora_rank=2, objective=OBJECTIVES["clear"], teacher="frozen"),
    "learned": replace(CONFIG, train="learned"),
}
HOW = ("one", "two", "disabled", "fused")


def with_users_lora(how: str) -> Any:
    pipe = tiny_pipe()
    torch.manual_seed(5)
    names = ("mine", "other") if how == "two" else ("mine",)
    for name in names:
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), adapter_name=name)
    for name in lora_parameters(pipe.transformer):
        torch.nn.init.normal_(pipe.transformer.get_parameter(name), std=0.1)
    pipe.transformer.set_adapter(list(names))
    if how == "disabled":
        pipe.transformer.disable_adapters()
    if how == "fused":
        pipe.fuse_lora()
    pipe.transformer.requires_grad_(False)
    return pipe


def users(pipe: Any) -> dict[str, torch.Tensor]:
    model = pipe.transformer
    names = lora_parameters(model) - lora_parameters(model, LORA_NAME)
    return {name: model.get_parameter(name).detach().clone() for name in names}


def activity(pipe: Any) -> dict[str, Any]:
    return {
        path: (tuple(n for n in layer.active_adapters if n != LORA_NAME), layer.disable_adapters, layer.merged)
        for path, layer in pipe.transformer.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("how", HOW)
def test_a_training_leaves_it_alone(how, way, tmp_path):
    pipe = with_users_lora(how)
    before, active, plain = users(pipe), activity(pipe), TINY["wan"].run(pipe)
    result = finetune(pipe, SLA, samples(2), tmp_path / "out", WAYS[way])
    after = users(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    flags = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    assert not [name for name in flags if flags[name] and not is_learned(name) and LORA_NAME not in name]
    if way in ("learned", "lora", "lora with a frozen teacher"):
        result.handle.remove()
        assert activity(pipe) == active
        assert torch.allclose(TINY["wan"].run(pipe), plain, atol=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_a_frozen_teacher_has_it(how):
    """The teacher is the model that the user has, not the bare one."""
    from dit_accel.training.trainables import Trainables

    pipe = with_users_lora(how)
    model = pipe.transformer
    with dit_accel.patch(pipe, SLA) as handle:
        with handle.disabled():
            plain = TINY["wan"].run(pipe)
        attentions = {path: module for path, module in model.named_modules() if path.endswith("attn1")}
        trained = Trainables(model, handle, attentions, WAYS["lora"])
        for name in lora_parameters(model, LORA_NAME):
            torch.nn.init.normal_(model.get_parameter(name))
        with trained.dense_teacher(frozen=True):
            taught = TINY["wan"].run(pipe)
            assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained.named())
        with trained.dense_teacher(frozen=False):
            student = TINY["wan"].run(pipe)
        trained.take_back()
    assert torch.allclose(taught, plain, atol=1e-5)
    assert not torch.allclose(student, plain, atol=1e-3)
