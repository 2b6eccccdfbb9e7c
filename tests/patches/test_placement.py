"""The automatic threshold asks where the model runs, not whether the machine has a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import dit_accel
from dit_accel.api import _min_tokens
from dit_accel.patches.families import FAMILIES
from dit_accel.patches.placement import execution_device
from tests.tiny import TINY

GPU = torch.device("cuda", 0)
CPU_TOKENS = 2048
FLUX = next(family for family in FAMILIES if family.min_tokens not in (8192, CPU_TOKENS))


class OnDevice(nn.Module):
    """A model whose parameters say that they are on a device, which need not exist."""

    def __init__(self, device: torch.device | None) -> None:
        super().__init__()
        self.device = device

    def parameters(self, recurse: bool = True) -> Any:
        return iter(() if self.device is None else (SimpleNamespace(device=self.device),))


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def of_model_offload() -> nn.Module:
    return cpu_offload_with_hook(layers(), execution_device=GPU)[0]


def of_sequential_offload() -> nn.Module:
    model = layers()
    cpu_offload(model, execution_device=GPU)
    return model


def of_a_chain_of_hooks() -> nn.Module:
    model = layers()
    add_hook_to_module(model, ModelHook())
    add_hook_to_module(model, AlignDevicesHook(execution_device=GPU, offload=True), append=True)
    return model


def of_group_offload() -> nn.Module:
    from diffusers.hooks import apply_group_offloading

    model = layers()
    apply_group_offloading(model, onload_device=GPU, offload_device=torch.device("cpu"), offload_type="leaf_level")
    return model


@pytest.mark.parametrize("there_is_a_gpu", [False, True])
@pytest.mark.parametrize("device", [torch.device("cpu"), GPU, torch.device("mps"), None])
def test_it_asks_the_model(device: torch.device | None, there_is_a_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is_a_gpu)
    on_cpu = device is None or device.type == "cpu"
    for family in FAMILIES:
        assert _min_tokens(OnDevice(device), family) == (CPU_TOKENS if on_cpu else family.min_tokens)


@pytest.mark.parametrize("build", [of_model_offload, of_sequential_offload, of_a_chain_of_hooks, of_group_offload])
def test_an_offloaded_model_is_where_it_runs(build: Any) -> None:
    model = build()
    assert {p.device.type for p in model.parameters()} <= {"cpu", "meta"}
    assert execution_device(model) == GPU
    assert _min_tokens(model, FLUX) == FLUX.min_tokens


def test_offloading_taken_back() -> None:
    model = of_model_offload()
    remove_hook_from_module(model, recurse=True)
    assert _min_tokens(model, FLUX) == CPU_TOKENS


def test_a_patched_pipeline_on_the_cpu_of_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TINY["wan"].build()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with dit_accel.patch(pipe) as handle:
        assert handle.sessions["transformer"].engine.min_tokens == CPU_TOKENS
