"""Blocks of 64 queries in the Hopper kernel, two a program, against the fp64 oracle; most of it needs the GPU."""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockMask, block_sparse_attention, choose_backend
from dit_accel.kernels.attention import variants
from dit_accel.kernels.mask.packed import PackedBlockMask
from dit_accel.kernels.mask.query_pairs import query_pairs

from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention, random_mask, visible_tokens
from .test_block_sparse import build
from .test_hopper import CASES, wrong_tiles

SHAPES = [(128, 128), (128, 64), (64, 128), (64, 64)]  # keys a block, head dim


def forward_of(block_k, dim, permuted, **changes):
    from dit_accel.kernels.attention.hopper.forward import PAIR_KEYS, default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    config = replace(default_config(PAIR_KEYS, dim, None, permuted, pairs=True), **changes)

    def forward(q, k, v, mask, rows, hide, scale):
        # Freed memory of the outputs' sizes, so that what no program writes shows.
        poison = [torch.full_like(q, 777.0), torch.full((q.shape[0], *q.shape[2:0:-1]), 777.0, device=q.device)]
        del poison
        return hopper_forward(q, k, v, mask, rows, hide, scale, config=config)

    return forward


def check(forward, q, k, v, mask, rows, hide, visible, device):
    """Output and log-sum-exp against float64, and two calls have the same bits."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, mask, rows, hide, visible = (
        None if x is None else x.to(device) for x in (q, k, v, mask, rows, hide, visible)
    )
    exact, exact_lse = dense_attention(q, k, v, visible, rows)
    eager, eager_lse = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    eager = eager + UNIT_ROUNDOFF[dtype] * v.double().abs().amax()
    first, second = (forward(q, k, v, mask, rows, hide, scale) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    out, lse = first
    assert_close(out, exact, eager, dtype, "out")
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
    assert torch.all(lse[~seen] == -torch.inf)
    assert torch.all(out[~seen.transpose(1, 2)] == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
def test_matches_oracle(turns, case, shape, dtype, device):
    block_k, dim = shape
    built = build(block=(64, block_k), dim=dim, dtype=dtype, **CASES[case])
    check(forward_of(block_k, dim, built[4] is not None, take_turns=turns), *built, device)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2500, 2570], ids=["even", "odd"])
@pytest.mark.parametrize("key_mask", [False, True], ids=["plain", "key_mask"])
def test_a_kept_plan_is_unpacked_to_the_pairs_of_its_mask(key_mask, length, device):
    q, k, v, mask, _, hide, _ = build(length=length, block=(64, 64), dim=128, dtype=torch.bfloat16, key_mask=key_mask)
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    hide = None if hide is None else hide.to(device)
    forward = forward_of(64, 128, False)
    unpacked = PackedBlockMask.of(mask, key_mask).lists()
    assert unpacked.paired is not None
    expected, found = (forward(q, k, v, x, None, hide, 128**-0.5) for x in (mask, unpacked))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def lists(name, heads, nq, nk):
    """Which blocks are kept, bool ``[1, heads, nq, nk]``."""
    keep = torch.rand(1, heads, nq, nk) < 0.3
    if name == "alike":
        keep[:, :, 1::2] = keep[:, :, : 2 * (nq // 2) : 2]
    elif name == "apart":
        keep[:, :, 1::2] &= ~keep[:, :, : 2 * (nq // 2) : 2]
    elif name == "one of a pair empty":
        keep[:, 0, ::2] = keep[:, 1, 1::2] = False
    elif name == "one of a pair dense":
        keep[:, 0, ::2] = keep[:, 1, 1::2] = True
    elif name == "single blocks":
        keep[:] = False
        keep[..., 2] = True
        keep[:, 1, ::2, 2], keep[:, 1, ::2, 4] = False, True
    elif name == "most pairs empty":
        keep[:, :, torch.arange(nq) // 2 % 3 != 1] = False
    return keep


LISTS = ["alike", "apart", "one of a pair empty", "one of a pair dense", "single blocks", "most pairs empty"]


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2500, 2570], ids=["even", "odd"])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_a_pair_that_agree_or_differ(name, permuted, turns, block_k, length, device):
    heads = 3
    q, k, v, _, rows, _, _ = build(
        length=length,
        heads=heads,
        block=(64, block_k),
        dim=128,
        dtype=torch.bfloat16,
        rows=(1, 3) if permuted else None,
    )
    keep = lists(name, heads, -(-length // 64), -(-length // block_k))
    mask = BlockMask.from_dense(keep, 64, block_k, length, length, backend="torch")
    built = (q, k, v, mask, rows, None, visible_tokens(mask, None, rows))
    check(forward_of(block_k, 128, permuted, take_turns=turns), *built, device)


@pytest.mark.gpu
@pytest.mark.parametrize("stages", [3, 4, 5])
def test_any_number_of_buffers_has_the_same_bits(stages, device):
    q, k, v, mask, _, _, _ = build(length=3000, block=(64, 64), dim=128, dtype=torch.bfloat16, empty_rows=True)
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    want = forward_of(64, 128, False)(q, k, v, mask, None, None, 0.1)
    for turns in (False, True):
        got = forward_of(64, 128, False, stages=stages, take_turns=turns)(q, k, v, mask, None, None, 0.1)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.gpu
@pytest.mark.parametrize("slope", [30.0, 400.0, 3000.0])
@pytest.mark.parametrize("case", ["plain", "bits_rows_key_mask"])
def test_rows_whose_logits_rise_or_fall_from_block_to_block(case, slope, device):
    """As in test_hopper.py: a row's reference is raised late."""
    q, k, v, mask, rows, hide, visible = build(block=(64, 64), dim=128, dtype=torch.bfloat16, **CASES[case])
    length = k.shape[1]
    q[..., 0] = torch.linspace(-1, 1, length).view(1, -1, 1)
    octave = 1 / (1.4426950408889634 * 128**-0.5)
    k[..., 0] = (torch.arange(length) / length).view(1, -1, 1) * slope * octave
    check(forward_of(64, 128, rows is not None), q, k, v, mask, rows, hide, visible, device)


MANY_CALLS = {
    # name: (keys a block, head dim, settings)
    "in_order": (64, 128, {"heads": 4, "batch": 2, "empty_rows": True}),
    "in_order_small_heads": (64, 64, {"heads": 4, "batch": 2}),
    "rows": (64, 128, {"heads": 4, "batch": 2, "rows": (1, 4), "empty_rows": True}),
    "rows_narrow_ring": (128, 64, {"heads": 9, "rows": (1, 9), "empty_rows": True}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("turns", [False, True], ids=["free", "turns"])
@pytest.mark.parametrize("case", MANY_CALLS)
def test_many_calls_have_the_same_bits(case, turns, device):
    """More tiles than multiprocessors, over and over: a race of the queue or of a buffer is rare."""
    block_k, dim, settings = MANY_CALLS[case]
    q, k, v, mask, rows, _, _ = build(length=6000, block=(64, block_k), dim=dim, dtype=torch.bfloat16, **settings)
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    rows = None if rows is None else rows.to(device)
    forward = forward_of(block_k, dim, rows is not None, take_turns=turns, ring=1 if "narrow" in case else None)
    want, want_lse = forward(q, k, v, mask, rows, None, dim**-0.5)
    cold = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    for number in range(300):
        if number % 4 == 0:
            cold.zero_()
        out, lse = forward(q, k, v, mask, rows, None, dim**-0.5)
        wrong = (out != want).any(-1).transpose(1, 2) | (lse != want_lse)
        assert not wrong.any(), f"call {number}: {wrong_tiles(wrong, lse, rows)}"


@pytest.mark.gpu
def test_permuted_calls_on_several_streams_do_not_wait_for_each_other(device):
    q, k, v, mask, rows, _, _ = build(
        length=3000, heads=16, block=(64, 64), dim=128, dtype=torch.bfloat16, rows=(1, 16)
    )
    q, k, v, mask, rows = (x.to(device) for x in (q, k, v, mask, rows))
    forward = forward_of(64, 128, True, ring=1)
    want = forward(q, k, v, mask, rows, None, 0.1)[0]
    torch.cuda.synchronize()
    streams, outputs = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(forward(q, k, v, mask, rows, None, 0.1)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it_and_no_others(which, device):
    """A block that only the other query block of a pair reads, above all."""
    q, k, v, mask, _, _, visible = build(length=1000, block=(64, 64), dim=128, dtype=torch.bfloat16)
    {"q": q, "k": k, "v": v}[which][0, 170, 1, 5] = float("nan")
    q, k, v, mask = (x.to(device) for x in (q, k, v, mask))
    out, _ = forward_of(64, 128, False)(q, k, v, mask, None, None, 0.1)
    expected = torch.zeros(1000, 3, dtype=torch.bool)
    if which == "q":
        expected[170, 1] = True
    else:
        expected[:, 1] = visible[0, 1, :, 170]
    assert expected.any()
    assert torch.equal(out[0].isnan().any(-1).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("block_k", [64, 128])
def test_lists_made_on_the_gpu_are_those_made_in_torch(block_k, device):
    torch.manual_seed(3)
    mask = random_mask((2, 3), 5000, 4100, 64, block_k, bits=True, empty_rows=True)
    want, got = query_pairs(mask, 64, "torch"), query_pairs(mask.to(device), 64, "triton")
    assert torch.equal(got.header.cpu(), want.header)
    listed = torch.arange(want.kv_indices.shape[-1]) < want.header[..., :2].flatten(2)[..., None]
    full = torch.arange(want.kv_indices.shape[-1]) < want.header[..., 2:4].flatten(2)[..., None]
    assert torch.equal(got.kv_indices.cpu()[listed], want.kv_indices[listed])
    assert torch.equal(got.kv_bits.cpu()[listed & ~full], want.kv_bits[listed & ~full])


@pytest.mark.gpu
def test_it_is_the_choice_and_trains(monkeypatch, device):
    """Forward by pairs, gradients by the portable kernels from its output and log-sum-exp."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    q, k, v, mask, _, _, visible = build(length=1000, block=(64, 64), dim=128, dtype=torch.bfloat16)
    q, k, v, mask, visible = (x.to(device) for x in (q, k, v, mask, visible))
    assert choose_backend(q, k, v, mask).reason.endswith("Hopper kernel")
    with monkeypatch.context() as off:
        off.setattr(variants, "PAIRS_ON_HOPPER", False)
        assert "portable kernel" in choose_backend(q, k, v, mask).reason
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    found = torch.autograd.grad(block_sparse_attention(*leaves, mask), leaves, grad)
    exact = torch.autograd.grad(dense_attention(*leaves, visible)[0], leaves, grad.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours.double() - theirs).norm() <= 1e-2 * theirs.norm()


def test_it_is_the_choice_unless_it_is_switched_off(monkeypatch):
    """Two steps of one decision: the switch, and then what the kernel itself asks for."""
    q, k, v, mask, _, _, _ = build(length=256, block=(64, 64), dim=128, dtype=torch.bfloat16)
    monkeypatch.setattr(variants, "_why_not_gluon", lambda q: None)
    assert variants.why_not_hopper_half(q, k, v, mask, None) == "it needs a GPU of compute capability 9.0"
    monkeypatch.setattr(variants, "PAIRS_ON_HOPPER", False)
    assert variants.why_not_hopper_half(q, k, v, mask, None) == "its form for blocks of 64 queries is switched off"


@pytest.mark.parametrize(("block", "why_not"), [((64, 128), None), ((32, 64), "got 32x64"), ((64, 32), "got 64x32")])
def test_which_blocks_it_takes(block, why_not, monkeypatch):
    from dit_accel.kernels.attention.hopper import forward

    class OnGpu:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (1, 256, 3, 128)

    monkeypatch.setattr(forward, "compute_capability", lambda index: (9, 0))
    said = forward.why_not_shape(OnGpu, build(length=256, block=block)[3])
    assert said == (why_not and f"it takes blocks of 64 or 128 queries and keys, {why_not}")
