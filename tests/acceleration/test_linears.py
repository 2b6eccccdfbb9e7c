"""Linear layers in 8 bits: near the exact product by a derived bound, and given back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel.acceleration.linears import quantize_linears
from tests.recipes import POOLED
from tests.tiny import TINY

pytest.importorskip("torchao", reason="torchao is not installed; .ci/run runs these beside it")


def _int8_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Largest error of a product whose factors are rounded to 8 bits: a whole step each, for what is clipped."""
    step_x = x.abs().amax(-1, keepdim=True) / 127
    step_w = weight.abs().amax(-1) / 127
    columns = x.shape[-1]
    return x.abs().sum(-1, keepdim=True) * step_w + step_x * weight.abs().sum(-1) + columns * step_x * step_w


def _blocks_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: m for path, m in model.named_modules() if type(m) is nn.Linear}


@pytest.mark.parametrize("family", ["cogvideox", "flux", "ltx"])
def test_products_are_near_and_weights_come_back(family):
    tiny = TINY[family]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    before = {
        path: (layer.weight, layer.weight.detach().clone()) for path, layer in _blocks_linears(pipe.transformer).items()
    }
    undo, said = quantize_linears(pipe, "int8", least_width=16)
    rounded = {
        path: layer for path, layer in _blocks_linears(pipe.transformer).items() if layer.weight is not before[path][0]
    }
    assert rounded
    assert f"{len(rounded)} in int8" in said
    assert not any("norm" in path or path == "proj_out" or "time" in path for path in rounded)
    torch.manual_seed(0)
    for path, layer in rounded.items():
        x = torch.randn(2, 7, layer.in_features)
        x[:, 3] *= 30  # a token with outliers is rounded by its own scale
        exact = x.double() @ before[path][1].double().T
        got = layer(x).double() - (0 if layer.bias is None else layer.bias.double())
        error = (got - exact).abs()
        assert (error <= _int8_bound(x.double(), before[path][1].double()) + 1e-5).all()
        assert error.max() > 0
    assert not torch.equal(tiny.run(pipe), plain)
    undo()
    for path, layer in _blocks_linears(pipe.transformer).items():
        assert layer.weight is before[path][0]
        assert torch.equal(layer.weight, before[path][1])
    assert torch.equal(tiny.run(pipe), plain)


def test_a_lora_stays_exact_over_rounded_weights():
    from peft import LoraConfig

    tiny = TINY["ltx"]
    pipe = tiny.build()
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    plain = tiny.run(pipe)
    undo, _ = quantize_linears(pipe, "int8", least_width=16)
    kinds = {path: type(m.weight).__name__ for path, m in _blocks_linears(pipe.transformer).items()}
    assert all(kind == "Parameter" for path, kind in kinds.items() if "lora" in path)
    assert any(kind != "Parameter" for path, kind in kinds.items() if path.endswith("to_q.base_layer"))
    assert torch.isfinite(tiny.run(pipe)).all()
    undo()
    assert torch.equal(tiny.run(pipe), plain)


def test_narrow_layers_are_left_and_said():
    _, said = quantize_linears(TINY["ltx"].build(), "int8")
    assert said.startswith("linear layers: 0 in int8; ")
    assert "narrower than 512" in said


def test_twice_rounds_once():
    pipe = TINY["ltx"].build()
    first, _ = quantize_linears(pipe, "int8", least_width=16)
    second, said = quantize_linears(pipe, "int8", least_width=16)
    assert "linear layers: 0 in int8" in said
    assert "in few bits already" in said
    second()
    first()
    assert all(type(layer.weight) is nn.Parameter for layer in _blocks_linears(pipe.transformer).values())


@pytest.mark.parametrize("kind", ["fp4", "", "FP8"])
def test_an_unknown_format_is_refused(kind):
    pipe = TINY["wan"].build()
    with pytest.raises(ValueError, match="linear must be one of fp8, int8, or None, got"):
        dit_accel.accelerate(pipe, POOLED, linear=kind)
    dit_accel.patch(pipe, POOLED).remove()  # nothing is left of the refused call


def test_without_torchao_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("dit_accel.acceleration.linears.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs torchao, which is not installed: pip install 'dit-accel\[compile\]'"):
        dit_accel.accelerate(TINY["wan"].build(), POOLED, linear="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which such weights may wait for")
def test_fp8_is_refused_where_there_is_no_gpu():
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.9 or newer, got a CPU alone"):
        quantize_linears(TINY["ltx"].build(), "fp8", least_width=16)


def test_fp8_of_float32_weights_is_said_to_change_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # offloaded weights wait for it
    _, said = quantize_linears(TINY["ltx"].build(), "fp8", least_width=16)
    assert "0 in fp8" in said
    assert "float32, where FP8 per token takes bfloat16" in said


@pytest.mark.gpu
def test_fp8_products_are_near_and_given_back():
    torch.manual_seed(0)
    tiny = TINY["ltx"]
    pipe = tiny.build()
    pipe.transformer.to("cuda", torch.bfloat16)
    before = {path: layer.weight.detach().clone() for path, layer in _blocks_linears(pipe.transformer).items()}
    undo, said = quantize_linears(pipe, "fp8", least_width=16)
    assert "linear layers: 0" not in said
    for path, layer in _blocks_linears(pipe.transformer).items():
        if type(layer.weight) is nn.Parameter:
            continue
        x = torch.randn(2, 64, layer.in_features, device="cuda", dtype=torch.bfloat16)
        exact = x.double() @ before[path].double().T
        got = layer(x).double() - (0 if layer.bias is None else layer.bias.double())
        # e4m3 has 4 bits: a factor is off by at most 1/16 of itself, or of its row's scale where it is tiny.
        bound = (2 / 16 + 1 / 256) * (x.double().abs() @ before[path].double().abs().T) + exact.abs() / 128 + 1e-2
        assert ((got - exact).abs() <= bound).all()
    undo()
    assert all(torch.equal(layer.weight, before[path]) for path, layer in _blocks_linears(pipe.transformer).items())
