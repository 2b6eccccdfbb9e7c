"""accelerate: a patch with all that speeds up a run beside attention, undone by one call."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import dit_accel
from dit_accel.acceleration import api, linears
from dit_accel.acceleration.compiled import compile_blocks
from tests.recipes import POOLED
from tests.tiny import TINY


@pytest.fixture
def everything(monkeypatch):
    """All parts, with a compiler that is quick and layers that a tiny model has."""
    pytest.importorskip("torchao", reason="torchao is not installed; .ci/run runs these beside it")
    monkeypatch.setattr(api, "compile_blocks", partial(compile_blocks, backend="eager"))
    monkeypatch.setattr(api, "quantize_linears", partial(linears.quantize_linears, least_width=16))
    yield {"compile": True, "linear": "int8", "vae": "bf16,channels_last"}
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["ltx", "flux", "cogvideox"])
def test_all_parts_run_are_said_and_undone(family, everything):
    tiny = TINY[family]
    pipe = tiny.build()
    plain = tiny.run(pipe, output_type="pt")
    handle = dit_accel.accelerate(pipe, POOLED, **everything)
    assert torch.isfinite(tiny.run(pipe, output_type="pt")).all()
    summary = handle.summary()
    assert summary.sparse_calls
    assert [change.split(":")[0] for change in summary.changes] == [
        "autoencoder",
        "linear layers",
        "transformer blocks",
    ]
    assert set(summary.changes) <= set(summary.lines())
    assert summary.to_dict()["changes"] == summary.changes
    handle.remove()
    assert torch.equal(tiny.run(pipe, output_type="pt"), plain)
    assert all(module._compiled_call_impl is None for module in pipe.transformer.modules())


def test_a_second_acceleration_starts_clean(everything):
    tiny = TINY["ltx"]
    pipe, other = tiny.build(), tiny.build()
    with dit_accel.accelerate(pipe, "dense", **everything):
        tiny.run(pipe)
    with dit_accel.accelerate(pipe, POOLED, linear="int8") as handle:
        again = tiny.run(pipe)
        assert len(handle.summary().changes) == 1
    with dit_accel.accelerate(other, POOLED, linear="int8"):
        assert torch.equal(tiny.run(other), again)


def test_blocks_that_a_user_compiled_stay_compiled(everything):
    tiny = TINY["ltx"]
    pipe = tiny.build()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    own = [block._compiled_call_impl for block in pipe.transformer.transformer_blocks]
    dit_accel.accelerate(pipe, POOLED, compile=True).remove()
    assert [block._compiled_call_impl for block in pipe.transformer.transformer_blocks] == own


@pytest.mark.parametrize("wrong", [{"linear": "fp4"}, {"vae": "slow"}, {"backend": "no such"}])
def test_a_refused_part_leaves_nothing_behind(wrong, everything):
    tiny = TINY["ltx"]
    pipe = tiny.build()
    plain = tiny.run(pipe, output_type="pt")
    with pytest.raises(ValueError):
        dit_accel.accelerate(pipe, POOLED, **(everything | wrong))
    assert torch.equal(tiny.run(pipe, output_type="pt"), plain)
    with dit_accel.patch(pipe, POOLED):
        pass


def test_a_bare_model_is_refused():
    with pytest.raises(ValueError, match="accelerate takes a diffusers pipeline, got WanTransformer3DModel"):
        dit_accel.accelerate(TINY["wan"].build().transformer)


def test_a_pipeline_without_an_autoencoder_says_so():
    pipe = TINY["wan"].build()
    pipe.vae = None
    with pytest.raises(ValueError, match="WanPipeline has no autoencoder to set, got vae='bf16'"):
        dit_accel.accelerate(pipe, POOLED, vae="bf16")


@pytest.mark.parametrize("recipe", ["carried", "fast"])
def test_a_pipeline_of_the_same_components_is_accelerated_with_the_first(recipe):
    """Its own acceleration is refused before its autoencoder is touched."""
    tiny = TINY["wan"]
    pipe = tiny.build()
    other = type(pipe)(**pipe.components)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    plain = tiny.run(other, output_type="pt")
    handle = dit_accel.accelerate(pipe, recipe, vae="bf16")
    accelerated = tiny.run(pipe, output_type="pt")
    assert not torch.equal(accelerated, plain)
    with pytest.raises(ValueError, match="transformer is patched already"):
        dit_accel.accelerate(other, "dense", vae="frames=2,fp16")
    assert pipe.vae.dtype == torch.bfloat16
    assert "_decode" not in vars(pipe.vae)
    assert torch.equal(tiny.run(other, output_type="pt"), accelerated)
    handle.remove()
    assert torch.equal(tiny.run(other, output_type="pt"), plain)
    assert torch.equal(tiny.run(pipe, output_type="pt"), plain)
