"""Launch helpers: every number that a kernel gets is checked by the address that it leads to."""

import itertools
import subprocess
import sys

import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.common import launch


@pytest.mark.parametrize(("dim", "padded"), [(1, 16), (16, 16), (17, 32), (48, 64), (64, 64), (96, 128), (256, 256)])
def test_a_head_is_padded_to_a_power_of_two(dim, padded):
    assert launch.padded_head_dim(dim) == padded


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("per_head", [1, 5])
def test_strides_of_lists_lead_to_the_entry_that_broadcasting_takes(shape, per_head):
    lists = torch.arange(shape[0] * shape[1] * per_head).view(*shape, per_head)
    batch_stride, head_stride = launch.list_strides(lists, per_head)
    every = lists.expand(2, 3, per_head)
    for b, h, n in itertools.product(range(2), range(3), range(per_head)):
        assert lists.flatten()[b * batch_stride + h * head_stride + n] == every[b, h, n]


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_leading_strides_lead_to_the_entry_that_broadcasting_takes(shape):
    whole = torch.arange(shape[0] * shape[1] * 40).view(*shape, 40)
    x = whole[..., 3:20]
    batch_stride, head_stride = launch.lead_strides(x)
    every = x.expand(2, 3, 17)
    for b, h, n in itertools.product(range(2), range(3), range(17)):
        assert whole.flatten()[3 + b * batch_stride + h * head_stride + n] == every[b, h, n]


def test_what_is_left_out_has_no_strides():
    assert launch.lead_strides(None) == (0, 0)
    assert launch.list_strides(None, 7) == (0, 0)


def test_strides_of_tokens_are_those_of_batch_token_and_head():
    q, k = torch.empty(2, 5, 3, 8), torch.empty(2, 3, 7, 8).transpose(1, 2)
    assert launch.token_strides(q, k) == (120, 24, 8, 168, 8, 56)


def test_copies_are_made_only_where_they_are_needed():
    x = torch.arange(24.0).view(1, 4, 6)
    assert launch.unit_stride(x) is x
    turned = launch.unit_stride(x.mT)
    assert turned.stride(-1) == 1
    assert torch.equal(turned, x.mT)
    # Expanded leading dimensions stay.
    rows = torch.arange(6, dtype=torch.int32).expand(2, 3, 6)
    assert launch.contiguous_rows(rows) is rows
    narrow = launch.int32_rows(rows.long())
    assert narrow.dtype == torch.int32
    assert narrow.is_contiguous()
    assert torch.equal(narrow, rows)
    assert launch.contiguous_rows(None) is launch.int32_rows(None) is None


def test_a_key_mask_of_one_prompt_serves_the_batch():
    mask = torch.tensor([[True, False, True]])
    whole = launch.contiguous_key_mask(mask, 2, 3)
    assert whole.is_contiguous()
    assert whole.tolist() == [[True, False, True]] * 2
    assert launch.contiguous_key_mask(None, 2, 3) is None


@pytest.mark.parametrize("bits", ["none", "empty", "some"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_a_kernel_is_told_what_it_may_read(bits, hidden, permuted):
    """A stand-in is a tensor like any other; only the constants say that nothing of it counts."""
    keep = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    settings = {}
    if bits != "none":
        settings["bit_rows"] = torch.full(keep.shape, -1 if bits == "empty" else 0)
        settings["token_bits"] = torch.ones(0 if bits == "empty" else 1, 64, 1, dtype=torch.int32)
    mask = BlockMask.from_dense(keep, 64, 32, 190, 100, backend="torch", **settings)
    rows = torch.arange(190, dtype=torch.int32).view(1, 1, -1) if permuted else None
    key_mask = torch.ones(2, 100, dtype=torch.bool) if hidden else None
    counts, fulls, index, bit_rows, table, perm, shown = launch.mask_tensors(mask, rows, key_mask)
    assert counts.tolist() == [[[4] * 3] * 2]
    assert fulls.tolist() == [[[3] * 3] * 2]  # the last key block is short
    assert torch.equal(index, mask.kv_indices)
    assert all(x.is_contiguous() for x in (counts, fulls, index, bit_rows, table, perm, shown))
    assert (bit_rows is index, table is index) == (bits == "none",) * 2
    assert (perm is rows) == permuted
    assert (shown.dtype == torch.uint8) == hidden
    assert launch.mask_constants(mask, rows, key_mask) == {
        "BLOCK_Q": 64,
        "BLOCK_K": 32,
        "PERMUTED": permuted,
        "HAS_BITS": bits == "some",
        "HAS_KEY_MASK": hidden,
    }


def test_launch_helpers_do_without_triton():
    code = "import sys, dit_accel.kernels.common.launch; assert 'triton' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-1000:]
