"""Forms of a key step of the Hopper kernel at head dim 64, against the fp64 oracle; all of it needs the GPU.

Without one they run in test_hopper_interpreted.py.
"""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels import BlockMask

from .oracle import visible_tokens
from .test_block_sparse import build
from .test_hopper import CASES
from .test_hopper_pairs import check

FORMS = {
    "single": {"wide_steps": False, "take_turns": True, "stages": 8},
    "wide": {},
    "wide turns": {"wide_steps": True, "take_turns": True, "stages": 4, "keep_q": True},
    "wide stages": {"wide_steps": True, "take_turns": True, "stages": 2},
}


def forward_of(form, permuted):
    from dit_accel.kernels.attention.hopper.forward import default_config, hopper_forward

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs a GPU of compute capability 9.0")
    config = replace(default_config(64, 64, None, permuted), **FORMS[form])

    def forward(q, k, v, mask, rows, hide, scale):
        # Freed memory of the outputs' sizes, so that what no program writes shows.
        poison = [torch.full_like(q, 777.0), torch.full((q.shape[0], *q.shape[2:0:-1]), 777.0, device=q.device)]
        del poison
        return hopper_forward(q, k, v, mask, rows, hide, scale, config=config)

    return forward


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_matches_oracle(form, case, dtype, device):
    built = build(block=(128, 64), dim=64, dtype=dtype, **CASES[case])
    check(forward_of(form, built[4] is not None), *built, device)


def lists(name, heads, nq, nk):
    """Which blocks are kept, bool ``[1, heads, nq, nk]``."""
    keep = torch.zeros(1, heads, nq, nk, dtype=torch.bool)
    counts = {"one": 1, "two": 2, "three": 3, "odd": nk - 1 + nk % 2}
    if name in counts:
        keep.scatter_(-1, torch.rand(keep.shape).topk(counts[name]).indices, True)
    else:
        # As many as the query block's number, none first.
        keep |= torch.arange(nk) < torch.arange(nq)[:, None]
    return keep


@pytest.mark.gpu
@pytest.mark.parametrize("length", [2500, 2560], ids=["ragged", "whole"])
@pytest.mark.parametrize("permuted", [False, True], ids=["in_order", "permuted"])
@pytest.mark.parametrize("name", ["one", "two", "three", "odd", "rising"])
@pytest.mark.parametrize("form", FORMS)
def test_lists_of_every_length(form, name, permuted, length, device):
    heads = 3
    q, k, v, _, rows, _, _ = build(
        length=length,
        heads=heads,
        block=(128, 64),
        dim=64,
        dtype=torch.bfloat16,
        rows=(1, 3) if permuted else None,
    )
    mask = BlockMask.from_dense(
        lists(name, heads, -(-length // 128), -(-length // 64)), 128, 64, length, length, backend="torch"
    )
    built = (q, k, v, mask, rows, None, visible_tokens(mask, None, rows))
    check(forward_of(form, permuted), *built, device)
