"""Angles that go past processors: the same clip, taken only where a kernel turns and nothing is lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.acceleration.compiled import compile_blocks
from dit_accel.patches import rotary
from dit_accel.patches.seam import is_diverted
from tests.tiny import TINY
from tests.tiny_registry import MODELS

KINDS = ("wan", "wan2.2", "wan-vace")
TRANSFORMERS = ("wan-animate", "chronoedit", "skyreels")
WHOLE = {"window": (1.0, 1.0, 1.0)}  # a window over everything: dense attention, by this package


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Angles are taken on a CPU too. The tokens of each pair of queries and keys that was turned."""
    seen: list[int] = []

    def counted(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(q.shape[1])
        return turn(q, k, cos, sin)

    turn = rotary.rotate_pairs
    monkeypatch.setattr(rotary, "rotate_pairs", counted)
    monkeypatch.setattr(rotary.TakeAngles, "devices", ("cpu",))
    return seen


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", KINDS)
def test_a_pipeline_whose_angles_were_taken_makes_the_same_clip(name, turns):
    tiny = TINY[name]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    assert not turns
    with dit_accel.patch(pipe, "window", **WHOLE) as handle:
        near(tiny.run(pipe), wanted)
        layers = sum(len(session.engine.records) for session in handle.sessions.values())
        assert len(turns) >= layers
    turns.clear()
    assert tiny.run(pipe).equal(wanted)
    assert not turns


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_processor_of_the_list_is_without_fault(name, turns):
    tiny = MODELS[name]
    model = tiny.build()
    wanted = tiny.run(model)
    with dit_accel.patch(model, "window", **WHOLE):
        near(tiny.run(model), wanted)
    assert turns


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled_code_takes_them_in_one_graph(whole, turns):
    tiny = TINY["wan"]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    if whole:
        pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    else:
        compile_blocks(pipe, backend="aot_eager", fullgraph=True)
    with dit_accel.patch(pipe, "window", **WHOLE):
        near(tiny.run(pipe), wanted)
    assert turns


@pytest.mark.parametrize("compiled", ["forward", "blocks"])
def test_a_hook_and_its_processor_may_be_on_two_sides_of_a_graph(compiled, turns):
    """The layer that the hook announces is then unknown to the call, which is dense."""
    tiny = TINY["wan"]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    torch._dynamo.reset()
    if compiled == "blocks":
        compile_blocks(pipe, backend="eager")
    for block in pipe.transformer.blocks:
        forward = block.attn1.forward
        outside = torch.compile(forward, backend="eager") if compiled == "forward" else torch.compiler.disable(forward)
        block.attn1.forward = outside
    with dit_accel.patch(pipe, "window", **WHOLE):
        near(tiny.run(pipe), wanted)
    assert turns


def test_a_call_that_broke_leaves_the_next_one_its_own_angles(turns):
    model = MODELS["skyreels"].build()
    layer = model.blocks[0].attn1
    hidden, angles = torch.randn(1, 6, 24).double(), (torch.randn(1, 6, 1, 12), torch.randn(1, 6, 1, 12))
    wanted = layer(hidden, None, None, angles).detach()

    def interrupt(*_given: object) -> None:
        raise KeyboardInterrupt

    with dit_accel.patch(model, "window", **WHOLE):
        hook = layer.to_v.register_forward_pre_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            layer(hidden, None, None, angles)
        hook.remove()
        near(layer(hidden, None, None, angles), wanted)
    assert not turns


@pytest.mark.parametrize("by_place", range(1, 5))
def test_a_mask_and_angles_come_by_place_or_by_name(by_place, turns):
    model = MODELS["skyreels"].build()
    layer = model.blocks[0].attn1
    given = {
        "hidden_states": torch.randn(1, 6, 24).double(),
        "encoder_hidden_states": None,
        "attention_mask": torch.ones(6, 6, dtype=torch.bool).tril(),
        "rotary_emb": (torch.randn(1, 6, 1, 12), torch.randn(1, 6, 1, 12)),
    }
    args, kwargs = list(given.values())[:by_place], dict(list(given.items())[by_place:])
    with torch.no_grad():
        wanted = layer(**given)
        assert not layer(**{**given, "attention_mask": None}).allclose(wanted)
        with dit_accel.patch(model, "window", **WHOLE):
            near(layer(*args, **kwargs), wanted)
    assert turns == [6]


def test_a_dense_patch_and_a_disabled_one_leave_the_model_as_it_is(turns):
    tiny = TINY["wan"]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    with dit_accel.patch(pipe, "dense"):
        assert tiny.run(pipe).equal(wanted)
    with dit_accel.patch(pipe, "window", **WHOLE) as handle, handle.disabled():
        assert tiny.run(pipe).equal(wanted)
    assert not turns


def test_a_device_where_no_kernel_is_faster_keeps_them(turns, monkeypatch):
    monkeypatch.setattr(rotary.TakeAngles, "devices", ("cuda",))
    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, "window", **WHOLE):
        tiny.run(pipe)
    assert not turns


def test_another_backend_keeps_them(turns):
    tiny = TINY["wan"]
    pipe = tiny.build()
    with dit_accel.patch(pipe, "window", **WHOLE, backend="torch"):
        tiny.run(pipe)
    assert not turns


def test_a_gradient_is_torchs(turns):
    tiny = MODELS["skyreels"]
    model = tiny.build()
    with dit_accel.patch(model, "window", **WHOLE):
        model(**tiny.given(), return_dict=False)[0].sum().backward()
    assert not turns
    weight = next(weight for name, weight in model.named_parameters() if name.endswith("attn1.to_k.weight"))
    assert float(weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_another_processor_and_a_symbol_of_somebody_else_keep_them(compiled, turns, monkeypatch):
    from diffusers.models.transformers import transformer_wan

    class Own(transformer_wan.WanAttnProcessor):
        """As somebody would write it: it turns queries and keys by itself."""

    tiny = TINY["wan"]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    if compiled:
        compile_blocks(pipe, backend="eager")
    with dit_accel.patch(pipe, "window", **WHOLE):
        with monkeypatch.context() as patch:
            original = torch.nn.functional.scaled_dot_product_attention

            def theirs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_given: object) -> torch.Tensor:
                return original(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

            patch.setattr(transformer_wan, "dispatch_attention_fn", theirs)
            near(tiny.run(pipe), wanted)
        assert not turns
        pipe.transformer.set_attn_processor(Own())
        near(tiny.run(pipe), wanted)
    assert not turns


def test_an_attention_that_takes_no_mask_keeps_them():
    """Angles would go nowhere in its place."""
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Own(torch.nn.Module):
        processor = WanAttnProcessor()

        def forward(self, hidden_states: object, encoder_hidden_states: object = None, rotary_emb: object = None):
            raise NotImplementedError

    session: Any = SimpleNamespace(engine=SimpleNamespace(backend="auto"))
    assert rotary.angles_hook(session, Own(), is_diverted) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_operator_is_what_a_trace_takes_it_for(dtype):
    """Of heads that lie behind one another and apart: the outputs are contiguous all the same."""
    q, k = (torch.randn(2, heads, 5, 8).to(dtype).transpose(1, 2) for heads in (3, 2))
    angles = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8)
    operator = torch.ops.dit_accel.rotate_pairs.default
    torch.library.opcheck(operator, (q, k, *angles), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_makes_the_same_clip(compiled, monkeypatch):
    tiny = MODELS["skyreels"]
    model = tiny.build().to("cuda", torch.bfloat16)
    given = {name: _on_gpu(value) for name, value in tiny.given().items()}
    wanted = tiny.run(model, given)
    turned: list[int] = []

    def counted(q: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        turned.append(q.shape[1])
        return turn(q, *rest)

    turn = rotary.rotate_pairs
    monkeypatch.setattr(rotary, "rotate_pairs", counted)
    if compiled:
        model.compile(fullgraph=True)
    with dit_accel.patch(model, "window", **WHOLE):
        found = tiny.run(model, given)
    assert turned
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def _on_gpu(value: object) -> object:
    """Tensors of floating point in bfloat16."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)
