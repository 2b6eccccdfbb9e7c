"""Means of left-out blocks in the launch of the Hopper kernel, against the fp64 oracle; most of it needs the GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention import variants
from dit_accel.kernels.attention.api import why_not_at_once
from dit_accel.kernels.attention.hopper.mean_inputs import mean_inputs
from dit_accel.kernels.attention.means import BlockMeans, LeftOutMeans
from dit_accel.kernels.mask.packed import PackedBlockMask, pack_bits
from dit_accel.kernels.pyramid.means import add_left_out_means

from .means_oracle import attention_over_means, means_of
from .oracle import UNIT_ROUNDOFF, assert_close, random_rows
from .test_block_sparse import build

HEADS = 3
ON_GPU = {
    # name: (queries a block, keys a block, head dim, tokens of a mean)
    "pairs": (64, 64, 128, 64),
    "pairs of 16": (64, 64, 128, 16),
    "pairs 128": (64, 128, 128, 128),
    "pairs 128 of 32": (64, 128, 128, 32),
    "pairs D=64": (64, 64, 64, 64),
    "half": (128, 64, 128, 64),
    "half of 16": (128, 64, 128, 16),
}


def keep_of(name: str, nq: int, nk: int) -> torch.Tensor:
    """Which blocks are kept, bool ``[1, HEADS, nq, nk]``: with rows that keep nothing and rows that keep everything."""
    torch.manual_seed(5)
    keep = torch.rand(1, HEADS, nq, nk) < 0.3
    if name == "alike":
        keep[:, :, 1::2] = keep[:, :, : 2 * (nq // 2) : 2]
    elif name == "apart":
        keep[:, :, 1::2] &= ~keep[:, :, : 2 * (nq // 2) : 2]
    elif name == "one full, one empty":
        keep[:, 0, ::2], keep[:, 0, 1::2] = True, False
    elif name == "none":
        keep[:] = False
    keep[:, 1, 0], keep[:, 2, -1] = False, True
    return keep


def launch(q, k, v, mask, rows, given, scale=None, **changes):
    """Output and log-sum-exp of one launch, in memory that held other numbers."""
    from dit_accel.kernels.attention.hopper.forward import PAIR_KEYS, default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    pairs = mask.block_q == 64
    block_k = PAIR_KEYS if pairs else mask.block_k
    config = replace(default_config(block_k, q.shape[-1], None, rows is not None, pairs=pairs), **changes)
    poison = [torch.full_like(q, 777.0), torch.full((q.shape[0], *q.shape[2:0:-1]), 777.0, device=q.device)]
    del poison
    return hopper_forward(q, k, v, mask, rows, None, scale or q.shape[-1] ** -0.5, config=config, means=given)


def on(device, *given):
    """Tensors, masks and means there."""
    moved = []
    for x in given:
        if isinstance(x, LeftOutMeans):
            keys, values = x.means.keys.to(device), x.means.values.to(device)
            x = LeftOutMeans(replace(x.means, keys=keys, values=values), x.kept.to(device), x.backend)
        elif x is not None:
            x = x.to(device)
        moved.append(x)
    return moved


def case_of(name, length, dtype, permuted, lists="random", slope=None):
    """Inputs of a call, on the CPU."""
    block_q, block_k, dim, tokens = ON_GPU[name]
    sizes = {"length": length, "heads": HEADS, "block": (block_q, block_k), "dim": dim, "dtype": dtype}
    q, k, v, _, rows, _, _ = build(**sizes, rows=(1, HEADS) if permuted else None)
    if slope is not None:
        q[..., 0] = torch.linspace(-1, 1, length).view(1, -1, 1)
        k[..., 0] = (torch.arange(length) / length).view(1, -1, 1) * slope * dim**0.5 * math.log(2)
    keep = keep_of(lists, -(-length // block_q), -(-length // block_k))
    mask = BlockMask.from_dense(keep, block_q, block_k, length, length, backend="torch")
    return q, k, v, mask, rows, means_of(k, v, mask, rows, tokens)


def check(found, q, k, v, mask, rows, given):
    dtype = q.dtype
    exact, exact_lse = attention_over_means(q, k, v, mask, rows, given)
    eager, eager_lse = attention_over_means(q, k, v, mask, rows, given, dtype=torch.float32)
    assert_close(found[0], exact, eager + UNIT_ROUNDOFF[dtype] * v.double().abs().amax(), dtype, "out")
    assert_close(found[1], exact_lse, eager_lse, torch.float32, "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [2500, 4096, 4170])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", ON_GPU)
def test_one_launch_is_one_softmax(name, permuted, length, dtype, device):
    given = on(device, *case_of(name, length, dtype, permuted))
    first, second = (launch(*given) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    check(first, *given)


@pytest.mark.gpu
@pytest.mark.parametrize("lists", ["alike", "apart", "one full, one empty", "none"])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", ["pairs", "pairs 128 of 32", "half"])
def test_lists_that_agree_or_differ(name, permuted, lists, device):
    given = on(device, *case_of(name, 2570, torch.bfloat16, permuted, lists))
    check(launch(*given), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("slope", [30.0, 400.0, 3000.0])
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_rows_whose_logits_rise_or_fall(name, slope, device):
    given = on(device, *case_of(name, 2570, torch.bfloat16, False, slope=slope))
    check(launch(*given), *given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_any_number_of_buffers_and_turns_have_the_same_bits(name, device):
    given = on(device, *case_of(name, 4170, torch.bfloat16, False))
    want = launch(*given)
    for changes in ({"stages": 3}, {"stages": 4}, {"take_turns": True}, {"take_turns": False}):
        got = launch(*given, **changes)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_many_calls_have_the_same_bits(name, permuted, device):
    given = on(device, *case_of(name, 6000, torch.bfloat16, permuted))
    want, want_lse = launch(*given, ring=1 if permuted else None)
    cold = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    for number in range(200):
        if number % 4 == 0:
            cold.zero_()
        out, lse = launch(*given, ring=1 if permuted else None)
        assert torch.equal(out, want), f"call {number}"
        assert torch.equal(lse, want_lse), f"call {number}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_nan_stays_in_its_row_and_in_its_head(name, device):
    """Of 40 means a head, whose step of 64 reaches past them, into no other head."""
    q, k, v, mask, rows, given = on(device, *case_of(name, 2500, torch.bfloat16, False))
    q[0, 170, 2, 5] = torch.nan
    given.means.keys[0, 1, 0], given.means.values[0, 1, 0] = torch.nan, torch.nan
    out, lse = launch(q, k, v, mask, rows, given)
    expected = torch.zeros(2500, HEADS, dtype=torch.bool, device=device)
    expected[170, 2] = expected[:, 1] = True
    assert torch.equal(out[0].isnan().any(-1), expected)
    assert torch.equal(lse[0].isnan().T, expected)


def two_launches(q, k, v, mask, rows, given):
    from dit_accel.kernels.attention.hopper.forward import hopper_forward

    scale = q.shape[-1] ** -0.5
    out, lse = hopper_forward(q, k, v, mask, rows, None, scale)
    return add_left_out_means(
        out, lse, q, given.means, given.kept, block_q=mask.block_q, rows=rows, scale=scale, backend="triton"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_of_real_length(name, permuted, dtype, device):
    """32,760 tokens of two heads: some query blocks against the oracle, all of them against two launches."""
    block_q, block_k, dim, tokens = ON_GPU[name]
    length, heads, chosen = 32_760, 2, (0, 1, 77, -2, -1)
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, length, heads, dim, device=device, dtype=dtype) for _ in range(3))
    rows = random_rows((1, heads), length).to(device) if permuted else None
    nq, nk = -(-length // block_q), -(-length // block_k)
    keep = torch.rand(1, heads, nq, nk, device=device) < 0.2
    keep[:, :, 1], keep[:, 0, -2] = False, True
    mask = BlockMask.from_dense(keep, block_q, block_k, length, length, backend="torch")
    given = means_of(k, v, mask, rows, tokens)
    packed = PackedBlockMask.of(mask, False, "triton")
    assert torch.equal(packed.kept, given.kept)
    out, lse = launch(q, k, v, packed.lists(), rows, given)
    before, before_lse = two_launches(q, k, v, mask, rows, given)
    # Either rounds weights, values and its output to the dtype; two launches round once more between them.
    largest = float(v.abs().max())
    assert float((out.float() - before.float()).abs().max()) <= 8 * UNIT_ROUNDOFF[dtype] * largest
    assert float((lse - before_lse).abs().max()) <= 1e-4
    order = torch.arange(length, device=device).expand(heads, -1) if rows is None else rows[0].long()
    sizes = torch.tensor([min(tokens, length - n) for n in range(0, length, tokens)], device=device)
    for head in range(heads):
        kh, vh = (x[0, order[head], head].double() for x in (k, v))
        keys = torch.cat([kh, given.means.keys[0, head].double()])
        values = torch.cat([vh, given.means.values[0, head].double()])
        for block in chosen:
            asking = order[head].split(block_q)[block]
            reads = keep[0, head, block]
            seen = reads.repeat_interleave(block_k)[:length]
            bias = torch.cat([torch.where(seen, 0.0, -torch.inf), sizes.log().masked_fill(reads, -torch.inf)]).double()
            scores = q[0, asking, head].double() @ keys.T * dim**-0.5 + bias
            exact, exact_lse = scores.softmax(-1) @ values, scores.logsumexp(-1)
            assert float((out[0, asking, head] - exact).abs().max()) <= 4 * UNIT_ROUNDOFF[dtype] * largest
            assert float((lse[0, head, asking] - exact_lse).abs().max()) <= 2e-5 * float(exact_lse.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pairs", "half"])
def test_a_graph_replays_it(name, device):
    q, k, v, mask, rows, given = on(device, *case_of(name, 4170, torch.bfloat16, True))
    launch(q, k, v, mask, rows, given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = launch(q, k, v, mask, rows, given)
    v.neg_()
    given.means.values.neg_()
    want = launch(q, k, v, mask, rows, given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


@pytest.mark.parametrize(("number", "tokens", "stacked"), [(64, 64, True), (40, 16, False), (128, 8, True)])
@pytest.mark.parametrize("bytes_of_row", [1, 4, 6])
def test_what_the_kernel_reads_of_means(number, tokens, stacked, bytes_of_row):
    kv_len = number * tokens - 5
    keys, values = torch.randn(2, 1, 2, number, 128)
    kept = torch.randint(0, 256, (1, 2, 3, bytes_of_row), dtype=torch.uint8)
    found = mean_inputs(LeftOutMeans(BlockMeans(keys, values, tokens, 64, kv_len), kept), torch.bfloat16)
    assert found.stacked is stacked
    for ours, theirs in ((found.keys, keys), (found.values, values)):
        assert ours.is_contiguous()
        assert torch.equal(ours if stacked else ours.transpose(1, 2), theirs.bfloat16())
    words = -(-bytes_of_row // 4)
    assert found.kept.shape == (1, 2, 3, words)
    assert torch.equal(found.kept.view(torch.uint8)[..., :bytes_of_row], kept)
    head_stride, rows, row_words, steps, whole, head_rows, cols, log2_tokens, log2_rest = found.numbers
    assert (head_stride, rows, row_words) == (3 * words, 3, words)
    assert (steps, whole) == (-(-number // 64), number - 1)
    assert (head_rows, cols) == ((number, 0) if stacked else (0, 128))
    assert (2**log2_tokens, round(2**log2_rest)) == (tokens, tokens - 5)
    assert found.per_block == 64 // tokens


def test_nothing_is_copied_at_the_length_of_the_default():
    """512 means a head, and 64 bytes of bits a row."""
    keys, values = torch.zeros(2, 1, 2, 512, 128, dtype=torch.bfloat16)
    kept = torch.zeros(1, 2, 512, 64, dtype=torch.uint8)
    found = mean_inputs(LeftOutMeans(BlockMeans(keys, values, 64, 64, 32_760), kept), torch.bfloat16)
    assert [x.data_ptr() for x in (found.keys, found.values, found.kept)] == [
        x.data_ptr() for x in (keys, values, kept)
    ]


def test_bits_that_begin_between_words_are_copied():
    """A ring's span of rows, say."""
    kept = torch.randint(0, 256, (1, 1, 5, 3), dtype=torch.uint8)[:, :, 1:, :]
    means = BlockMeans(*torch.zeros(2, 1, 1, 24, 64), 64, 64, 24 * 64)
    found = mean_inputs(LeftOutMeans(means, kept), torch.float16)
    assert found.kept.data_ptr() % 4 == 0
    assert torch.equal(found.kept.view(torch.uint8)[..., :3], kept)
    assert found.numbers[-1] == -math.inf


WHY_NOT = [
    ("half", {}, None),
    ("pairs", {}, None),
    ("pairs", {"backend": "torch"}, "it is the Triton backend's"),
    ("pairs", {"key_mask": True}, "keys are hidden"),
    ("half", {"visible": True}, "keys are hidden"),
    ("pairs", {"bits": True}, "the mask has token bits"),
    ("pairs", {"learns": True}, "gradients and traces have an operator for each step"),
    ("pairs", {"off": True}, "its form with means is switched off for blocks of 64 queries"),
    ("half 128", {}, "means are read 64 a step, and a step of 128 queries has 128 keys or two blocks"),
    ("half D=64", {}, "means are read 64 a step, and a step of 128 queries has 64 keys or two blocks"),
]


@pytest.mark.parametrize(("name", "settings", "said"), WHY_NOT)
def test_why_not_in_one_launch(name, settings, said, monkeypatch):
    monkeypatch.setattr(variants, "why_not_hopper_half", lambda *_: None)
    monkeypatch.setattr(variants, "MEANS_ON_HOPPER_AT", () if "off" in settings else (64, 128))
    block = {"half": (128, 64), "half 128": (128, 128), "half D=64": (128, 64), "pairs": (64, 64)}[name]
    dim = 64 if name.endswith("D=64") else 128
    hidden = {"key_mask": "key_mask" in settings, "bits": "bits" in settings}
    q, k, v, mask, rows, hide, _ = build(length=256, block=block, dim=dim, dtype=torch.bfloat16, **hidden)
    visible = torch.ones(1, 1, 4) if "visible" in settings else None
    means = BlockMeans(*torch.zeros(2, 1, 3, 4, dim), 64, block[1], 256, visible)
    given = LeftOutMeans(means, pack_bits(mask.to_dense()), settings.get("backend", "triton"))
    q.requires_grad_("learns" in settings)
    assert why_not_at_once("triton", q, k, v, mask, given, rows=rows, key_mask=hide) == said
    assert why_not_at_once("torch", q, k, v, mask, given) == "it is the Triton backend's"


def test_without_a_hopper_gpu_the_kernel_says_so(monkeypatch):
    monkeypatch.setattr(variants, "MEANS_ON_HOPPER_AT", (64,))
    q, k, v, mask, rows, _, _ = build(length=256, block=(64, 64), dim=128, dtype=torch.bfloat16)
    given = means_of(k, v, mask, rows, 64)
    assert why_not_at_once("triton", q, k, v, mask, given) == "it needs a GPU"
