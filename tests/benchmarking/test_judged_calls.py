"""What judges methods on recorded calls: outputs and kept mass against float64, and that the recorded run is dense."""

from __future__ import annotations

import pytest
import torch

from benchmarks.judged_calls import dense, mass_kept, sparse
from benchmarks.recorded_calls import calls_in_memory, pipeline, run
from dit_accel import patch
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.run import Run
from dit_accel.stages.order.simple import Tiles

LAYOUT = TokenLayout((3, 10, 11), 0, 330)
BLOCK = (64, 32)


@pytest.fixture
def call() -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 330, 2, 16, generator=generator) for _ in range(3))
    return AttentionCall.of(0, AttentionInputs(q, k, v), LAYOUT, StepContext(), Run())


@pytest.fixture
def blocks() -> SequenceBlocks:
    return SequenceBlocks(LAYOUT, Tiles((4, 4, 4)).rows(LAYOUT, torch.device("cpu")), *BLOCK, torch.device("cpu"))


def _weights(call: AttentionCall) -> torch.Tensor:
    """Attention float64 ``[H, S, S]`` in the model's order."""
    q, k = (x[0].transpose(0, 1).double() for x in (call.q, call.k))
    return (q @ k.transpose(1, 2) * 16**-0.5).softmax(-1)


def test_outputs_are_those_of_the_pairs_that_are_kept(call, blocks):
    values, weights = call.v[0].transpose(0, 1).double(), _weights(call)
    torch.testing.assert_close(dense(call)[0].double(), weights @ values, rtol=0, atol=2e-6)
    rows = blocks.kernel_rows.flatten().long()
    q, k = (x[0, rows].double() for x in (call.q, call.k))
    own = torch.arange(330)
    kept = torch.zeros(2, 330, 330, dtype=torch.bool)
    for head in range(2):
        for first in range(0, 330, 64):
            mean = q[first : first + 64, head].mean(0)
            scores = [float(mean @ k[begin : begin + 32, head].mean(0)) for begin in range(0, 330, 32)]
            best = set(sorted(range(11), key=lambda n: -scores[n])[:3])
            reads = torch.tensor([n in best or first <= 32 * n < first + 64 for n in range(11)])
            kept[head, rows[first : first + 64, None], rows] = reads[own // 32]
    shown = weights * kept
    expected = shown / shown.sum(-1, keepdim=True) @ values
    out, share = sparse(call, blocks, 3 / 11)
    torch.testing.assert_close(out[0].double(), expected, rtol=0, atol=2e-6)
    assert share == pytest.approx(float(kept.double().mean()))


def test_every_choice_has_as_many_blocks_and_own_ones_only_where_they_are_best(call, blocks):
    mass = torch.rand(1, 2, 6, 11, generator=torch.Generator().manual_seed(1)) + 0.1
    mass[0, :, torch.arange(6), 2 * torch.arange(6).clamp(max=5)] = 1e-3  # a block's own keys are its worst
    shares = (mass / mass.sum(-1, keepdim=True)).double()
    assert mass_kept(call, blocks, mass, mass.log(), 3 / 11) == pytest.approx(
        float(shares.topk(3).values.sum(-1).mean())
    )
    worst = mass_kept(call, blocks, mass, -mass, 3 / 11)
    assert worst == pytest.approx(float(shares.topk(3, largest=False).values.sum(-1).mean()))


def test_calls_in_memory_are_of_a_dense_run():
    pipe = pipeline("cpu")
    small = {"width": 48, "height": 48, "frames": 5, "steps": 3}
    prompts = [(3, "a red ball")]
    calls = calls_in_memory(pipe, prompts, density=0.1, **small)
    seen: list[AttentionCall] = []
    with patch(pipe, "dense") as handle, handle.observe(lambda _, call: seen.append(call)):
        run(pipe, prompts, **small)
    seen = [call for call in seen if call.step.index in (0, 2) and call.step.branch == "cond"]
    assert len(calls) == len(seen) == 2 * len({call.layer for call in seen})
    for mine, theirs in zip(calls, seen, strict=True):
        assert (mine.layer, mine.step.index) == (theirs.layer, theirs.step.index)
        assert mine.plan is not None
        for name in "qkv":
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
