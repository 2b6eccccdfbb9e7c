"""A block that is repeated for its gradients does what it did in the forward that it was a part of."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dit_accel
from tests.peaked import RECIPES, peaked
from tests.recipes import POOLED, WINDOW
from tests.tiny import TINY

PORTRAIT, LANDSCAPE = (3, 14, 12), (3, 12, 14)
# A plan of the layout alone, one that serves two forwards, and one that serves until queries and keys have moved.
KINDS = {
    "window": WINDOW,
    "kept": RECIPES["pooled"].with_fields({"schedule.refresh_every": 2}),
    "drift": RECIPES["drift"].with_fields({"schedule.drift_bound": 0.02, "schedule.refresh_every": 2}),
}


def _model() -> Any:
    return peaked(TINY["wan"].build().transformer).train()


def _inputs(size: tuple[int, int, int], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 16, *size, generator=generator),
        "timestep": torch.tensor([100.0 + 200.0 * seed]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
    }


def _gradient(model: Any, sizes: tuple[tuple[int, int, int], ...], call: Any = None) -> torch.Tensor:
    """Of all parameters, from one backward after a forward of each size."""
    call = model if call is None else call
    outputs = [call(**_inputs(size, seed)) for seed, size in enumerate(sizes)]
    sum(out.sample.square().mean() for out in outputs).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _checkpoint_blocks(model: Any, reentrant: bool) -> None:
    model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))


def _checkpoint_pairs(model: Any, reentrant: bool) -> None:
    """One repetition holds two blocks."""
    first, second = model.blocks

    def both(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        return second(first(hidden, *rest), *rest)

    def in_pairs(block: Any, *inputs: Any) -> torch.Tensor:
        return checkpoint(both, *inputs, use_reentrant=reentrant) if block is first else inputs[0]

    model.enable_gradient_checkpointing(in_pairs)


def _wrap_forward(modules: list[Any], reentrant: bool) -> None:
    """No hook of the module is called when it is repeated."""
    for module in modules:
        inner = module.forward
        module.forward = lambda *inputs, inner=inner, **more: checkpoint(
            partial(inner, **more), *inputs, use_reentrant=reentrant
        )


WAYS = {
    "blocks": _checkpoint_blocks,
    "pairs": _checkpoint_pairs,
    "forward of blocks": lambda model, reentrant: _wrap_forward(list(model.blocks), reentrant),
    "attention": lambda model, reentrant: _wrap_forward([block.attn1 for block in model.blocks], reentrant),
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_several_forwards_before_one_backward(kind, way, reentrant):
    sizes = (PORTRAIT, LANDSCAPE, PORTRAIT, PORTRAIT, PORTRAIT)
    found = []
    for checkpointed in (False, True):
        model = _model()
        if checkpointed:
            WAYS[way](model, reentrant)
        with dit_accel.patch(model, KINDS[kind]) as handle:
            found.append((_gradient(model, sizes), handle.summary()))
    (plain, before), (repeated, after) = found
    assert (plain - repeated).norm() <= 1e-5 * plain.norm()
    for one, other in zip(before.layers, after.layers, strict=True):
        assert one.sparse_calls == other.sparse_calls == len(sizes)
        assert one.plans_made == other.plans_made


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_transformer_is_repeated(kind):
    sizes = (PORTRAIT, LANDSCAPE, PORTRAIT)
    found = []
    for checkpointed in (False, True):
        model = _model()
        call = (lambda **inputs: checkpoint(model, use_reentrant=False, **inputs)) if checkpointed else model  # noqa: B023
        with dit_accel.patch(model, KINDS[kind]) as handle:
            found.append((_gradient(model, sizes, call), handle.summary().sparse_calls))
    assert (found[0][0] - found[1][0]).norm() <= 1e-5 * found[0][0].norm()
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_blocks(kind, backend):
    torch._dynamo.reset()
    sizes = (PORTRAIT, LANDSCAPE, PORTRAIT)
    found = []
    for checkpointed in (False, True):
        model = _model()
        if checkpointed:
            _checkpoint_blocks(model, False)
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
        with dit_accel.patch(model, KINDS[kind]):
            found.append(_gradient(model, sizes))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


def test_a_transformer_whose_graph_breaks_at_checkpointing_is_dense_and_says_so():
    """Its blocks run outside of any graph, and in no forward that a hook announced."""
    torch._dynamo.reset()
    found = []
    for recipe in ("dense", KINDS["kept"]):
        model = _model()
        _checkpoint_blocks(model, False)
        call = model if recipe == "dense" else torch.compile(model, backend="eager")
        with dit_accel.patch(model, recipe) as handle:
            found.append(_gradient(model, (PORTRAIT, LANDSCAPE), call))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()
    assert handle.summary().dense_calls == {"called outside a forward of its transformer": 2 * 2}


def test_moved_inputs_are_told_apart_or_refused():
    """What offloads saved tensors leaves nothing to recognise a forward by."""

    def gradient(sizes: tuple[tuple[int, int, int], ...], checkpointed: bool) -> torch.Tensor:
        model = _model()
        if checkpointed:
            _checkpoint_blocks(model, True)
        with (
            dit_accel.patch(model, KINDS["kept"]),
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
        ):
            return _gradient(model, sizes)

    one_plan = (PORTRAIT, PORTRAIT)
    assert (gradient(one_plan, False) - gradient(one_plan, True)).norm() <= 1e-5 * gradient(one_plan, False).norm()
    for several in ((PORTRAIT, LANDSCAPE), (PORTRAIT, PORTRAIT, PORTRAIT)):
        with pytest.raises(RuntimeError, match="Cannot tell of which forward"):
            gradient(several, True)


@pytest.mark.parametrize("way", ["blocks", "attention"])
def test_a_repetition_leaves_nothing_published(way):
    """Checkpointing ends a repetition as soon as it has what it needs, inside of the module."""
    model, other = _model(), _model().eval()
    WAYS[way](model, False)
    with torch.no_grad():
        plain = other(**_inputs(PORTRAIT, 7)).sample
    seen = []

    def look(gradient: torch.Tensor) -> None:
        with torch.no_grad():
            seen.append(other(**_inputs(PORTRAIT, 7)).sample)

    with dit_accel.patch(model, POOLED) as handle:
        out = model(**_inputs(PORTRAIT, 0)).sample
        # Called in the backward, behind the repetition of a block and before that of another.
        model.blocks[0].ffn.net[2].bias.register_hook(look)
        model.blocks[1].ffn.net[2].bias.register_hook(look)
        out.square().mean().backward()
        look(out)
        assert handle.summary().sparse_calls == 2
        assert not handle.summary().dense_calls
    assert len(seen) == 3
    assert all(torch.equal(one, plain) for one in seen)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_called_by_hand_is_dense_and_counted(compiled):
    """It is a part of no forward, whatever ran before: not of the last one, nor of the last repeated one."""
    torch._dynamo.reset()
    model = _model()
    _checkpoint_blocks(model, False)
    inputs = []
    hook = model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args))
    with torch.no_grad():
        model(**_inputs(PORTRAIT, 0))
    hook.remove()
    plain = model.blocks[0](*inputs[0])
    plain.square().sum().backward()
    wanted = model.blocks[0].attn1.to_q.weight.grad.clone()
    with dit_accel.patch(model, KINDS["kept"]) as handle:
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        _gradient(model, (PORTRAIT,))
        before = handle.summary()
        model.zero_grad()
        out = model.blocks[0](*inputs[0])
        out.square().sum().backward()
        after = handle.summary()
    assert torch.allclose(out, plain, atol=1e-6)
    assert torch.allclose(model.blocks[0].attn1.to_q.weight.grad, wanted, atol=1e-6)
    assert after.sparse_calls == before.sparse_calls
    assert after.dense_calls == {"called outside a forward of its transformer": 1}
