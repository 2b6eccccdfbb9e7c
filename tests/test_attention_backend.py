"""Sparse attention under a name of diffusers: it runs, what it cannot read stays dense, and it goes away whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

import dit_accel
from dit_accel.attention_backend import RegisteredBackend
from dit_accel.stages.select.pooled import Pooled
from tests.tiny import TINY

REGISTRY = attention_dispatch._AttentionBackendRegistry
SPARSE = dit_accel.Recipe(select=Pooled(density=0.25, block=(32, 32)))


def tables() -> list[Any]:
    members = AttentionBackendName
    found = [REGISTRY._backends, REGISTRY._constraints, REGISTRY._supported_arg_names, members._member_map_]
    return [dict(one) for one in (*found, members._value2member_map_)] + [list(members._member_names_)]


@pytest.fixture
def registered() -> Iterator[RegisteredBackend]:
    before, active = tables(), REGISTRY._active_backend
    with dit_accel.register_backend(SPARSE, min_tokens=100) as one:
        yield one
    assert tables() == before
    assert REGISTRY._active_backend is active


def draw(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float, block: int) -> torch.Tensor:
    """Pooled scores of blocks, the highest of each row kept, in float64: every row keeps as many."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    number = q.shape[2] // block
    means = [x.unflatten(2, (number, block)).mean(3) for x in (q, k)]
    scores = means[0] @ means[1].transpose(-1, -2)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(max(1, round(density * number))).indices, True)
    kept |= torch.eye(number, dtype=torch.bool)
    seen = kept.repeat_interleave(block, 2).repeat_interleave(block, 3)
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    return (logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def test_a_call_reads_the_blocks_of_highest_scores(registered: RegisteredBackend) -> None:
    q, k, v = draw(1, 256, 2, 16)
    with attention_backend("dit_accel"):
        out = dispatch_attention_fn(q, k, v)
    summary = registered.summary()
    assert summary.sparse_calls == 1
    assert not summary.dense_calls
    dense = dispatch_attention_fn(q, k, v)
    assert (out - dense).abs().max() > 0.05
    kept = summary.density
    assert kept is not None
    assert 0.25 <= kept < 0.5
    wanted = by_hand(q, k, v, 0.25, 32)
    torch.testing.assert_close(out.double(), wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("sizes", "changes", "reason"),
    [
        ((256, 256), {"attn_mask": torch.ones(1, 1, 256, 256, dtype=torch.bool)}, "a mask, dropout or causality"),
        ((256, 256), {"is_causal": True}, "a mask, dropout or causality"),
        ((256, 64), {}, "keys and queries differ in number"),
        ((64, 64), {}, "64 tokens, too few to gain (below 100)"),
    ],
)
def test_what_it_cannot_read_is_torchs_own(
    registered: RegisteredBackend, sizes: tuple[int, int], changes: dict[str, Any], reason: str
) -> None:
    (q, _, _), (_, k, v) = draw(1, sizes[0], 2, 16), draw(1, sizes[1], 2, 16)
    wanted = dispatch_attention_fn(q, k, v, **changes)
    with attention_backend("dit_accel"):
        assert dispatch_attention_fn(q, k, v, **changes).equal(wanted)
    (found,) = registered.summary().dense_calls
    assert found.startswith(reason)


def test_a_scale_and_gradients_go_through(registered: RegisteredBackend) -> None:
    q, k, v = (x.requires_grad_() for x in draw(1, 256, 2, 16))
    with attention_backend("dit_accel"):
        small = dispatch_attention_fn(q, k, v, scale=0.01)
        assert not small.equal(dispatch_attention_fn(q, k, v))
    small.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan"])
def test_a_model_with_the_name_set(registered: RegisteredBackend, name: str) -> None:
    """A pipeline of each kind runs, cross-attention and masks stay dense, and another name gives it back to the bit."""
    tiny = TINY[name]
    pipe = tiny.build()
    wanted = tiny.run(pipe)
    pipe.transformer.set_attention_backend("dit_accel")
    out = tiny.run(pipe)
    ran = registered.summary()
    assert ran.sparse_calls or ran.dense_calls
    if ran.sparse_calls:
        assert not out.equal(wanted)
    pipe.transformer.set_attention_backend("native")
    registered.reset()
    assert tiny.run(pipe).equal(wanted)
    assert not registered.summary().sparse_calls


def test_a_patched_layer_is_the_patchs(registered: RegisteredBackend) -> None:
    """The dense phase of a patch stays dense: the name means torch's own attention there."""
    pipe = TINY["wan"].build()
    with dit_accel.patch(copy.deepcopy(pipe), "pooled", density=0.5) as handle:
        wanted = TINY["wan"].run(handle.target)
    pipe.transformer.set_attention_backend("dit_accel")
    with dit_accel.patch(pipe, "pooled", density=0.5) as handle:
        out = TINY["wan"].run(pipe)
        assert handle.summary().sparse_calls > 0
    assert out.equal(wanted)
    assert not registered.summary().sparse_calls
    pipe.transformer.reset_attention_backend()


def test_two_names_side_by_side(registered: RegisteredBackend) -> None:
    q, k, v = draw(1, 256, 2, 16)
    with dit_accel.register_backend("pooled", name="other", density=1.0, min_tokens=1) as other:
        with attention_backend("other"):
            out = dispatch_attention_fn(q, k, v)
        torch.testing.assert_close(out, dispatch_attention_fn(q, k, v), atol=2e-6, rtol=0)
        assert other.summary().sparse_calls == 1
    assert not registered.summary().sparse_calls
    with pytest.raises(ValueError, match="not registered"), attention_backend("other"):
        pass


def test_an_active_name_that_is_removed_is_torchs_own_again() -> None:
    one = dit_accel.register_backend(SPARSE, min_tokens=1)
    REGISTRY.set_active_backend(AttentionBackendName("dit_accel"))
    one.remove()
    one.remove()
    assert REGISTRY._active_backend is AttentionBackendName.NATIVE


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "native"}, "diffusers has an attention backend 'native' already: give another name."),
        ({"name": "Dit-Accel"}, "The name of a backend must be a lower-case word, got 'Dit-Accel'."),
        ({"recipe": "fast"}, "The recipe has a reuse of blocks' results"),
        ({"recipe": "poled"}, "poled"),
        ({"backend": "none"}, "Unknown backend 'none'"),
    ],
)
def test_what_cannot_be_leaves_no_name(arguments: dict[str, Any], sentence: str) -> None:
    before = tables()
    with pytest.raises(ValueError, match=sentence[:30]):
        dit_accel.register_backend(**arguments)
    assert tables() == before
