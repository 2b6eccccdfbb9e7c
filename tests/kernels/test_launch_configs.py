"""Launch configurations: tiles give the result of whole blocks, and what does not fit a GPU is lowered."""

import itertools

import pytest
import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention import launch_configs, tuning
from dit_accel.kernels.attention.launch_configs import LaunchConfig, Work, lowered, shared_bytes
from dit_accel.kernels.common import capability

pytest.importorskip("triton")

from dit_accel.kernels.attention.triton import backward as backward_module
from dit_accel.kernels.attention.triton import forward as forward_module

from .oracle import assert_close
from .test_block_sparse import CASES
from .test_triton import check_forward, gradients

KIB = 1 << 10
OPS = ("forward", "backward_dq", "backward_dkv")
EVERY = [
    Work(op, block_q, block_k, columns, element_bytes, bits)
    for op, block_q, block_k, columns, element_bytes, bits in itertools.product(
        OPS, (16, 32, 64, 128), (16, 32, 64, 128), (64, 128, 256), (2, 4), (False, True)
    )
]


@pytest.fixture
def small_tiles(monkeypatch):
    """A half of the queries and a quarter of the keys of each block at a time."""

    def config(op, q, mask, permuted):
        return LaunchConfig(4, 1, max(16, mask.block_q // 2), max(16, mask.block_k // 4))

    for module in (forward_module, backward_module):
        monkeypatch.setattr(module, "launch_config", config)


@pytest.mark.parametrize(
    "case", ["ragged", "one_block", "blocks_128x64", "key_mask_rows", "bits_rows_key_mask", "bits", "empty_rows"]
)
def test_forward_in_tiles(case, small_tiles, device):
    check_forward(device, torch.float32, **CASES[case])


def test_forward_in_tiles_in_half_precision(small_tiles, device):
    check_forward(device, torch.float16, **CASES["bits_rows_key_mask"])


@pytest.mark.parametrize("case", ["ragged", "blocks_128x64", "key_mask_rows", "bits_rows_key_mask", "empty_rows"])
def test_gradients_in_tiles(case, small_tiles, device):
    ours, results = gradients(device, torch.float32, **CASES[case])
    for name, actual, exact, eager in zip("qkv", ours(), results["exact"], results["eager"]):
        assert_close(actual.cpu(), exact, eager, torch.float32, f"d{name}")


@pytest.mark.parametrize(
    ("unit", "kib"), [("warp", 99), ("warp", 163), ("warpgroup", 227), ("wave32", 64), ("wave64", 64)]
)
def test_every_default_fits(unit, kib):
    limit = kib * KIB
    for work in EVERY:
        config = tuning._default(work, unit, limit)
        assert shared_bytes(work, config, unit) <= limit, (work, config)
        tile_q, tile_k = config.tiles_of(work.block_q, work.block_k, work.op)
        assert work.block_q % tile_q == work.block_k % tile_k == 0
        assert min(tile_q, tile_k) >= 16
        assert config.num_warps in (1, 2, 4, 8)


def test_what_fits_is_left_as_it_is():
    work = Work("forward", 128, 64, 128, 2)
    config = LaunchConfig(8, 3, 128, 64)
    assert shared_bytes(work, config) == 32 * KIB + 2 * 2 * 16 * KIB + KIB
    assert lowered(work, config, 99 * KIB) == config
    # Stages first, then keys, then queries.
    assert lowered(work, config, 96 * KIB) == LaunchConfig(8, 2, 128, 64)
    assert lowered(work, config, 64 * KIB) == LaunchConfig(8, 2, 128, 32)
    assert lowered(work, config, 48 * KIB) == LaunchConfig(8, 2, 64, 32)


def test_each_step_down_needs_less():
    for work in EVERY:
        config = LaunchConfig(8, 4)
        while (smaller := launch_configs._smaller(work, config)) is not None:
            assert shared_bytes(work, smaller) <= shared_bytes(work, config)
            config = smaller
        assert config.num_stages == 1
        assert config.tiles_of(work.block_q, work.block_k, work.op) == (16, 16)


def test_what_fits_nowhere_is_refused_in_one_sentence():
    with pytest.raises(
        ValueError, match=r"No launch of forward with head dims of 256 fits 16384 bytes .* takes 51200\."
    ):
        lowered(Work("forward", 128, 128, 256, 4), LaunchConfig(8, 3), 16 * KIB)


class Query:
    """A tensor of a GPU that is not there."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __init__(self, dim, dtype):
        self.dtype = dtype
        self.shape = (1, 256, 1, dim)

    def element_size(self):
        return self.dtype.itemsize


@pytest.fixture
def gpu(monkeypatch):
    """Says which GPU is here: its compute capability and its shared memory."""

    def here(capability_of, kib, name="NVIDIA Test"):
        monkeypatch.setattr(capability, "compute_capability", lambda index: capability_of)
        monkeypatch.setattr(capability, "shared_memory", lambda index: kib * KIB)
        monkeypatch.setattr(tuning, "_device_name", lambda index: name)
        tuning.matrix_unit.cache_clear()

    yield here
    tuning.matrix_unit.cache_clear()


def mask_of(block_q, block_k):
    return BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool), block_q, block_k, 2 * block_q, 2 * block_k)


@pytest.mark.parametrize(("dim", "dtype"), [(256, torch.bfloat16), (128, torch.float32), (256, torch.float32)])
def test_the_devices_own_limit_is_asked(dim, dtype, gpu):
    """What needs 128 KiB or more as whole blocks is lowered on a GPU that has 99, and stays on one that has all."""
    work = Work("forward", 128, 128, dim, dtype.itemsize)
    assert shared_bytes(work, tuning._usual(work)) > 99 * KIB
    needs = []
    for kib in (1000, 99, 70):
        gpu((8, 9), kib)
        config = tuning.launch_config("forward", Query(dim, dtype), mask_of(128, 128), True)
        needs.append(shared_bytes(work, config))
        assert needs[-1] <= kib * KIB
    assert needs == sorted(needs, reverse=True)


def test_a_measured_entry_is_taken_as_it_is(gpu):
    gpu((9, 0), 227, "NVIDIA H200")
    config = tuning.launch_config("forward", Query(128, torch.bfloat16), mask_of(128, 64), True)
    assert config == LaunchConfig(8, 4)
    gpu((9, 0), 227, "NVIDIA GH200 480GB")
    config = tuning.launch_config("forward", Query(128, torch.bfloat16), mask_of(128, 64), True)
    assert config == LaunchConfig(8, 3)
