"""A patched pipeline goes on working with what users combine it with."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig

import dit_accel
from tests.recipes import POOLED, POOLED_FULL, WINDOW
from tests.tiny import TINY

COMPILED = ("wan", "hunyuan", "cogvideox", "ltx", "flux")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _compile(pipe, how: str) -> None:
    if how == "full":
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    elif getattr(pipe.transformer, "_repeated_blocks", None):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    else:  # CogVideoX names no repeated blocks
        for block in pipe.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend="eager")


@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_fullgraph_with_no_more_graphs_than_unpatched(family, how):
    tiny = TINY[family]
    plain = tiny.build(12)
    _compile(plain, how)
    expected = tiny.run(plain)
    graphs = _graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    pipe = tiny.build(12)
    _compile(pipe, how)
    with dit_accel.patch(pipe, "dense") as handle:
        assert torch.equal(tiny.run(pipe), expected)
        assert _graphs() == graphs
        assert set(handle.summary().dense_calls) == {"recipe is dense"}


@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("order", ["compile first", "patch first", "after another run"])
def test_compiled_sparse_equals_eager_sparse(how, order):
    tiny = TINY["wan"]
    pipe = tiny.build(12)
    with dit_accel.patch(pipe, POOLED):
        eager = tiny.run(pipe)
    if order == "patch first":
        handle = dit_accel.patch(pipe, POOLED)
        _compile(pipe, how)
    else:
        _compile(pipe, how)
        if order == "after another run":
            tiny.run(pipe)
            # Another pipeline holds the seam when this one is patched.
            dit_accel.patch(TINY["wan"].build(), WINDOW)
        handle = dit_accel.patch(pipe, POOLED)
    assert torch.allclose(tiny.run(pipe), eager, atol=1e-5)
    assert handle.summary().sparse_calls == 12 * 2 * 3
    handle.remove()


@pytest.mark.parametrize("how", ["regional", "full"])
@pytest.mark.parametrize("first", ["plain", "patched"])
def test_compiled_code_is_not_shared_between_patched_and_unpatched(first, how):
    tiny = TINY["wan"]
    plain, patched, other = tiny.build(), tiny.build(), tiny.build()
    with dit_accel.patch(patched, POOLED), dit_accel.patch(other, WINDOW):
        expected = {id(pipe): tiny.run(pipe, steps=1) for pipe in (plain, patched, other)}
    for pipe in (plain, patched, other):
        _compile(pipe, how)
    with dit_accel.patch(patched, POOLED), dit_accel.patch(other, WINDOW):
        pipes = (plain, patched, other) if first == "plain" else (patched, other, plain)
        for pipe in pipes * 2:
            assert torch.allclose(tiny.run(pipe, steps=1), expected[id(pipe)], atol=1e-5)


def test_compiled_pipeline_reads_the_step_when_it_runs():
    tiny = TINY["wan"]
    recipe = POOLED.with_fields({"schedule.dense_fraction": 0.5})
    pipe = tiny.build()
    with dit_accel.patch(pipe, recipe):
        eager = tiny.run(pipe, steps=4)
    _compile(pipe, "full")
    with dit_accel.patch(pipe, recipe) as handle:
        assert torch.allclose(tiny.run(pipe, steps=4), eager, atol=1e-5)
        summary = handle.summary()
    assert summary.dense_calls == {"dense phase": 8}
    assert summary.sparse_calls == 8


def test_lora_loads_and_unloads():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    with dit_accel.patch(pipe, "dense"):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
        adapted = tiny.run(pipe)
        assert not torch.equal(adapted, plain)
        pipe.transformer.disable_adapters()
        assert torch.equal(tiny.run(pipe), plain)
        pipe.transformer.enable_adapters()
    assert torch.equal(tiny.run(pipe), adapted)
    with dit_accel.patch(pipe, POOLED_FULL):
        assert torch.allclose(tiny.run(pipe), adapted, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_backend_of_the_user_stays_the_dense_path(when, monkeypatch):
    from diffusers.models import attention_dispatch

    tiny = TINY["wan"]
    pipe = tiny.build()
    used = []
    registry = attention_dispatch._AttentionBackendRegistry
    name = attention_dispatch.AttentionBackendName._NATIVE_MATH
    math_backend = registry._backends[name]
    monkeypatch.setitem(registry._backends, name, lambda **arguments: used.append(1) or math_backend(**arguments))
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
    if when == "before":
        pipe.transformer.set_attention_backend("_native_math")
    with dit_accel.patch(pipe, "dense") as handle:
        if when == "after":
            pipe.transformer.set_attention_backend("_native_math")
        tiny.run(pipe)
        assert handle.summary().dense_calls["recipe is dense"] == 2 * 2 * 3
    assert len(used) >= 2 * 2 * 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_group_offload(when):
    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, POOLED):
        expected = tiny.run(pipe)

    def offload():
        apply_group_offloading(
            pipe.transformer,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
        )

    if when == "before":
        offload()
    with dit_accel.patch(pipe, POOLED) as handle:
        if when == "after":
            offload()
        assert torch.equal(tiny.run(pipe), expected)
        assert handle.summary().sparse_calls == 2 * 2 * 3


def test_model_cpu_offload():
    from accelerate.hooks import ModelHook, add_hook_to_module

    # The pipeline method wants an accelerator; its mechanism is accelerate's wrapper of forward.
    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, POOLED):
        expected = tiny.run(pipe)
    with dit_accel.patch(pipe, POOLED):
        add_hook_to_module(pipe.transformer, ModelHook())
        wrapped = pipe.transformer.forward
        assert torch.equal(tiny.run(pipe), expected)
    assert pipe.transformer.forward is wrapped


@pytest.mark.gpu
def test_model_cpu_offload_on_gpu():
    tiny = TINY["wan"]
    pipe = tiny.build()
    pipe.enable_model_cpu_offload()
    # accelerate moves inputs at the first forward only, so the second guidance branch wants them on the GPU.
    call = tiny.call(torch.Generator())
    on_gpu = {name: value.cuda() for name, value in call.items() if isinstance(value, torch.Tensor)}
    expected = tiny.run(pipe, **on_gpu)
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(tiny.run(pipe, **on_gpu), expected)
    with dit_accel.patch(pipe, POOLED) as handle:
        assert torch.isfinite(tiny.run(pipe, **on_gpu)).all()
        assert handle.summary().sparse_calls == 2 * 2 * 3
    assert torch.equal(tiny.run(pipe, **on_gpu), expected)


def test_first_block_cache():
    tiny = TINY["wan"]
    pipe = tiny.build(4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    plain = tiny.run(pipe, steps=4)
    with dit_accel.patch(pipe, "dense") as handle:
        assert torch.equal(tiny.run(pipe, steps=4), plain)
        calls = [sum(layer.dense_calls.values()) for layer in handle.summary().layers]
    assert calls[0] == 8
    assert calls[-1] < 8  # the cache skipped blocks, and the layers are still told apart
    pipe.transformer.disable_cache()


@pytest.mark.parametrize("recipe", [POOLED, WINDOW], ids=["pooled", "window"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradient_checkpointing(recipe, compiled):
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = TINY["wan"].build().transformer.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        handle = dit_accel.patch(model, recipe)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        generator = torch.Generator().manual_seed(1)
        out = model(
            hidden_states=torch.randn(1, 16, 3, 12, 14, generator=generator),
            timestep=torch.tensor([500]),
            encoder_hidden_states=torch.randn(1, 16, 32, generator=generator),
        ).sample
        out.square().mean().backward()
        assert handle.summary().sparse_calls >= 2
        handle.remove()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(checkpointed) > 10
    for one, other in zip(plain, checkpointed, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_saved_weights_are_the_same(tmp_path):
    pipe = TINY["wan"].build()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    with dit_accel.patch(pipe, POOLED):
        after = pipe.transformer.state_dict()
        pipe.transformer.save_pretrained(tmp_path)
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())


def test_fused_projections_on_cogvideox():
    tiny = TINY["cogvideox"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, POOLED) as handle:
        expected = tiny.run(pipe)
        pipe.fuse_qkv_projections()
        assert torch.allclose(tiny.run(pipe), expected, atol=1e-3)
        assert handle.summary().sparse_calls == 2 * 2 * 3
        pipe.unfuse_qkv_projections()


@pytest.mark.parametrize("recipe", ["dense", POOLED])
def test_what_a_cache_answers_is_neither_sparse_nor_dense(recipe):
    """Pyramid attention broadcast skips attention modules by a hook around them."""
    from diffusers import PyramidAttentionBroadcastConfig

    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, recipe) as handle:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 2000),
            spatial_attention_block_identifiers=("blocks",),
            current_timestep_callback=lambda: 500,
        )
        pipe.transformer.enable_cache(config)
        out = tiny.run(pipe, steps=4)
        summary = handle.summary()
        pipe.transformer.disable_cache()
        assert not torch.equal(tiny.run(pipe, steps=4), out)
    computed = summary.sparse_calls + sum(summary.dense_calls.values())
    assert computed + summary.cached_calls == 2 * 2 * 4
    assert summary.cached_calls == 8
    assert summary.to_dict()["cached_calls"] == 8
    assert "answered by a cache: 8" in str(summary)
    assert not any("made no call" in reason for reason in summary.dense_calls)


@pytest.mark.parametrize("how", ["eager", "regional", "full"])
def test_perturbed_attention_is_the_models_own(how):
    """Perturbed-attention guidance puts the identity in place of a layer's attention, and no patch may attend there."""
    from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip

    tiny = TINY["qwen-image"]
    config = {
        "indices": [1],
        "fqn": "transformer_blocks",
        "skip_attention": False,
        "skip_attention_scores": True,
        "skip_ff": False,
    }
    plain = tiny.build()
    apply_layer_skip(plain.transformer, LayerSkipConfig(**config))
    expected = tiny.run(plain, steps=2)
    pipe = tiny.build()
    apply_layer_skip(pipe.transformer, LayerSkipConfig(**config))
    if how != "eager":
        _compile_as_it_is(pipe, how)
    with dit_accel.patch(pipe, POOLED_FULL) as handle:
        out = tiny.run(pipe, steps=2)
        summary = handle.summary()
    assert torch.allclose(out, expected, atol=1e-4)
    perturbed, other = summary.layers[1], summary.layers[0]
    assert perturbed.sparse_calls == 0
    assert other.sparse_calls == sum(perturbed.dense_calls.values()) > 0


def _compile_as_it_is(pipe, how: str) -> None:
    """Graphs may break: what perturbs is a function mode, which no trace goes through."""
    if how == "full":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    else:
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager")
