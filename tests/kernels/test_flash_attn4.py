"""flash-attn-4 as a backend: the lists it gets (with a stand-in that reads them as it does), and itself on a GPU."""

import sys
import types
from typing import NamedTuple

import pytest
import torch

from dit_accel.kernels import BlockMask, block_sparse_attention, choose_backend
from dit_accel.kernels.common import capability
from dit_accel.kernels.common.choice import Case, case_of

from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention
from .test_block_sparse import build


class Blocks(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def stand_in(q, k, v, softmax_scale, block_sparse_tensors, return_lse):
    """Attention over the lists: keys past the end count as zeros unless their block is the last of its list."""
    assert return_lse
    lists = block_sparse_tensors
    batch, q_len, heads, _ = q.shape
    block_q, block_k = lists.block_size
    for name in ("mask_block_cnt", "mask_block_idx", "full_block_cnt", "full_block_idx"):
        assert getattr(lists, name).dtype == torch.int32
        assert getattr(lists, name).is_contiguous()
    nk = -(-k.shape[1] // block_k)
    pad = (0, 0, 0, 0, 0, nk * block_k - k.shape[1])
    k, v = (torch.nn.functional.pad(x, pad) for x in (k, v))
    visible = torch.zeros(batch, heads, q_len, nk * block_k, dtype=torch.bool)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        for i in range(-(-q_len // block_q)):
            for kind in ("mask", "full"):
                counts, ids = getattr(lists, f"{kind}_block_cnt"), getattr(lists, f"{kind}_block_idx")
                assert ids.shape[-1] <= nk
                at = (min(b, len(counts) - 1), min(h, counts.shape[1] - 1), i)
                kept = ids[at][: int(counts[at])].tolist()
                for place, block in enumerate(kept):
                    assert 0 <= block < nk
                    end = (block + 1) * block_k
                    if place == len(kept) - 1:
                        end = min(end, k.shape[1] - pad[-1])
                    rows = slice(i * block_q, min((i + 1) * block_q, q_len))
                    assert not visible[b, h, rows, block * block_k : end].any(), "a block is listed twice"
                    visible[b, h, rows, block * block_k : end] = True
    return dense_attention(q, k, v, visible, scale=softmax_scale, dtype=torch.float64)


@pytest.fixture
def stub(monkeypatch):
    """A module ``flash_attn.cute`` with the two names the backend uses."""
    package, cute, sparsity = (
        types.ModuleType(name) for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity")
    )
    cute.flash_attn_func = stand_in
    sparsity.BlockSparseTensorsTorch = Blocks
    for module in (package, cute, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)


CASES = {
    "plain": {},
    "ragged": {"length": 203},
    "blocks_128x64": {"block": (128, 64), "length": 300},
    "masks_per_head": {"batch": 2, "lead": (2, 3), "length": 203},
    "shared_mask": {"batch": 2, "lead": (1, 1), "length": 203},
    "empty_rows": {"empty_rows": True, "length": 203},
    "more_keys": {"length": 100, "kv_length": 230},
}


@pytest.mark.parametrize("case", CASES)
def test_lists_say_what_the_mask_says(case, stub):
    pytest.importorskip("triton")
    from dit_accel.kernels.attention.flash_attn4 import fa4_attention

    q, k, v, mask, _, _, visible = build(**CASES[case], dtype=torch.float64)
    exact, exact_lse = dense_attention(q, k, v, visible)
    out, lse = fa4_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-12)


def test_a_short_block_goes_last_wherever_the_mask_lists_it(stub):
    pytest.importorskip("triton")
    from dit_accel.kernels.attention.flash_attn4 import fa4_attention

    q, k, v, *_ = build(length=203, dtype=torch.float64)
    one = torch.ones(1, 1, 4, dtype=torch.int32)
    # Partial entries 3 (the short one), 0 and 1, in this order, after the full entry 2.
    ids = torch.tensor([2, 3, 0, 1], dtype=torch.int32).expand(1, 1, 4, 4)
    mask = BlockMask(4 * one, ids, one, 64, 64, 203, 203)
    exact, _ = dense_attention(q, k, v, torch.ones(1, 3, 203, 203, dtype=torch.bool))
    out, _ = fa4_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)


def test_gradients_are_those_of_our_backward(stub):
    """Also at head dim 64, where its own Hopper backward is reported wrong; this test would notice."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the stand-in runs on a CPU; test_gradients_on_the_gpu takes its place")
    from dit_accel.kernels.attention.flash_attn4 import fa4_attention

    q, k, v, mask, _, _, visible = build(length=203, dim=64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    exact, _ = dense_attention(*inputs, visible)
    wanted = torch.autograd.grad(exact, inputs, grad.double())

    def narrow(*args, **kwargs):
        return tuple(x.float() for x in stand_in(*args, **kwargs))

    sys.modules["flash_attn.cute"].flash_attn_func = narrow
    out, _ = fa4_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
    got = torch.autograd.grad(out, inputs, grad)
    for actual, want in zip(got, wanted):
        assert (actual - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def test_the_predicate_names_what_is_missing(monkeypatch):
    q, _, _, mask, *_ = build(dtype=torch.float16)
    monkeypatch.setattr(capability, "_FA4_INSTALLED", False)
    assert "not installed" in capability.why_not_fa4(case_of(q, mask=mask))
    with pytest.raises(ValueError, match="not installed"):
        block_sparse_attention(q, q, q, mask, backend="fa4")
    monkeypatch.setattr(capability, "_FA4_INSTALLED", True)
    assert "CUDA device" in capability.why_not_fa4(case_of(q, mask=mask))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"arch": (12, 0)}, "9.0 and 10.x, got 12.0"),
        ({"arch": (8, 9)}, "9.0 and 10.x, got 8.9"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"dim": 100}, "multiples of 8"),
        ({"dim": 256}, "up to 128"),
        ({"block": (32, 64)}, "blocks of 64 or 128 queries"),
        ({"rows": True}, "reordered copies"),
        ({"key_mask": True}, "key mask"),
        ({"bits": True}, "token bits"),
    ],
    ids=str,
)
def test_the_predicate_on_hopper(change, message, monkeypatch):
    arch = change.get("arch", (9, 0))
    monkeypatch.setattr(capability, "_FA4_INSTALLED", True)
    monkeypatch.setattr(capability, "compute_capability", lambda index: arch)

    case = Case(
        torch.device("cuda", 0),
        change.get("dtype", torch.bfloat16),
        change.get("dim", 128),
        change.get("block", (128, 64)),
        permuted="rows" in change,
        hidden="key_mask" in change,
        token_bits="bits" in change,
    )
    reason = capability.why_not_fa4(case)
    assert reason is None if message is None else message in reason


@pytest.mark.parametrize(
    ("blocks", "recorded", "message"),
    [
        ((256, 128), False, None),
        ((256, 256), False, None),
        ((128, 128), False, "blocks of 256 queries and 128 or 256 keys here, got 128x128"),
        ((256, 64), False, "got 256x64"),
        # Gradients are our kernel's, which has no such blocks.
        ((256, 128), True, "block_q and block_k in"),
    ],
)
def test_the_predicate_on_blackwell(blocks, recorded, message, monkeypatch):
    monkeypatch.setattr(capability, "_FA4_INSTALLED", True)
    monkeypatch.setattr(capability, "compute_capability", lambda index: (10, 0))
    reason = capability.why_not_fa4(Case(torch.device("cuda", 0), torch.bfloat16, 128, blocks, recorded))
    assert reason is None if message is None else message in reason


@pytest.mark.parametrize("case", [{}, {"length": 700}, {"batch": 2, "lead": (2, 3), "length": 900}])
def test_lists_of_blackwells_blocks_say_what_the_mask_says(case, stub, monkeypatch):
    """Its interface takes lists there of a multiple of two tiles of 128 queries and of one of 128 keys."""
    pytest.importorskip("triton")
    from dit_accel.kernels.attention.flash_attn4 import fa4_attention

    def on_blackwell(*args, block_sparse_tensors, **settings):
        lists, length = block_sparse_tensors, args[0].shape[1]
        assert lists.block_size[0] % 256 == lists.block_size[1] % 128 == 0
        assert lists.mask_block_cnt.shape[2] == lists.full_block_cnt.shape[2] == -(-length // lists.block_size[0])
        return stand_in(*args, block_sparse_tensors=lists, **settings)

    monkeypatch.setattr(sys.modules["flash_attn.cute"], "flash_attn_func", on_blackwell)
    q, k, v, mask, _, _, visible = build(**{"block": (256, 128), "length": 512, **case}, dtype=torch.float64)
    exact, exact_lse = dense_attention(q, k, v, visible)
    out, lse = fa4_attention(q, k, v, mask, scale=q.shape[-1] ** -0.5)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=1e-12)


def test_auto_takes_it_only_where_the_table_says_so(monkeypatch):
    from dit_accel.kernels.attention import api as block_sparse

    q, k, v, mask, *_ = build()
    assert choose_backend(q, k, v, mask)[0] == "torch"
    monkeypatch.setattr(block_sparse.tuning, "fa4_is_fastest", lambda case: True)
    monkeypatch.setattr(capability, "why_not_fa4", lambda *args: None)
    assert choose_backend(q, k, v, mask)[0] == "fa4"
    monkeypatch.setattr(capability, "why_not_fa4", lambda *args: "it is raining")
    name, reason = choose_backend(q, k, v, mask)
    assert name == "torch"
    assert "fa4: it is raining" in reason


def on_the_gpu(case, dim, block, dtype, device):
    pytest.importorskip("flash_attn.cute", exc_type=ImportError)
    q, k, v, mask, _, _, visible = build(**CASES[case], dim=dim, dtype=dtype, **({"block": block} if block else {}))
    q, k, v, mask, visible = (x.to(device) for x in (q, k, v, mask, visible))
    reason = capability.why_not_fa4(case_of(q, mask=mask))
    if reason is not None:
        pytest.skip(reason)
    return q, k, v, mask, visible


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("block", [(128, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("case", ["plain", "ragged", "masks_per_head", "shared_mask", "empty_rows", "more_keys"])
def test_forward_on_the_gpu(case, block, dim, device):
    q, k, v, mask, visible = on_the_gpu(case, dim, block, torch.bfloat16, device)
    exact, exact_lse = dense_attention(q, k, v, visible)
    eager, eager_lse = dense_attention(q, k, v, visible, dtype=torch.float32)
    eager = eager + UNIT_ROUNDOFF[torch.bfloat16] * v.double().abs().amax()
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="fa4")
    assert_close(out, exact, eager, torch.bfloat16, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("case", ["ragged", "empty_rows"])
def test_gradients_on_the_gpu(case, dim, device):
    q, k, v, mask, visible = on_the_gpu(case, dim, (128, 64), torch.bfloat16, device)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    exact, _ = dense_attention(*inputs, visible)
    wanted = torch.autograd.grad(exact, inputs, grad.double())
    ours = torch.autograd.grad(block_sparse_attention(q, k, v, mask, backend="triton"), inputs, grad)
    got = torch.autograd.grad(block_sparse_attention(q, k, v, mask, backend="fa4"), inputs, grad)
    for actual, other, want in zip(got, ours, wanted):
        error, usual = ((x.double() - want).norm() / want.norm() for x in (actual, other))
        assert error <= 1.5 * usual + UNIT_ROUNDOFF[torch.bfloat16]
