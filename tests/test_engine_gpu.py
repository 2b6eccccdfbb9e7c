"""Sparse calls on the GPU, at sizes of real models, against attention under their own mask, in float64."""

import pytest
import torch

from dit_accel import presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from tests.calls import attend
from tests.stages.oracle import masked_attention

pytestmark = pytest.mark.gpu

CASES = {
    "wan": (TokenLayout((5, 30, 52), 0, 7800), 128, None),
    "hunyuan": (TokenLayout((4, 30, 40), 0, 5056), 128, 5000),
    "cogvideox": (TokenLayout((3, 30, 45), 226, 4276), 64, None),
    "image": (TokenLayout((1, 61, 67), 512, 4599), 128, None),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("preset", ["window", "pooled", "mass"])
@pytest.mark.parametrize("name", CASES)
def test_a_preset_equals_attention_under_its_own_mask(name, preset, dtype):
    layout, dim, visible = CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, layout.seq_len, 3, dim, device="cuda", dtype=dtype, generator=generator) for _ in range(3)
    )
    attn_mask = None
    if visible is not None:
        attn_mask = (torch.arange(layout.seq_len, device="cuda") < visible).expand(2, 1, 1, -1)
    engine = Engine(presets.resolve(preset), ["layer"], "auto", 0)
    # The last dense step, in which "mass" searches by our own dense attention, and the first sparse one.
    last_dense, first_sparse = (StepContext(index=index, num_steps=10, forward_id=index) for index in (1, 2))
    searched = attend(engine, 0, AttentionInputs(q, k, v, attn_mask), layout, last_dense, lambda: q)
    if preset == "mass":
        assert_near(searched, q, k, v, torch.ones(1, 1, *[layout.seq_len] * 2, device="cuda").bool(), attn_mask)
    calls = []
    engine.observer = calls.append
    out = attend(engine, 0, AttentionInputs(q, k, v, attn_mask), layout, first_sparse, lambda: q)
    assert "triton" in engine.backends_used.to_dict()["attention"]
    (call,) = calls
    rows = call.plan.rows[0, 0].long()
    place = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device="cuda"))
    assert_near(out, q, k, v, call.plan.mask.to_tokens()[..., place, :][..., place], attn_mask)
    assert int(engine.records[0].nan_calls) == 0


def assert_near(out, q, k, v, mask, attn_mask):
    """As near to attention in float64 under the mask as an eager kernel in the same dtype, and a rounding."""
    if attn_mask is not None:
        mask = mask & attn_mask
    expected = torch.stack(
        [masked_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask[b % len(mask)][None])[0] for b in range(2)]
    )
    eager = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    ).transpose(1, 2)
    budget = (eager.double() - expected).abs().max() + torch.finfo(q.dtype).eps * expected.abs().max()
    assert (out.double() - expected).abs().max() <= budget
