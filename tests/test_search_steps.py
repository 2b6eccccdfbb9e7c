"""Dense steps that search: whose log-sum-exp a search normalises with."""

import pytest
import torch

from dit_accel import Recipe
from dit_accel import engine as engines
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.common.choice import Choice
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from tests.calls import attend

LAYOUT = TokenLayout((4, 8, 8), 0, 256)
RECIPE = Recipe(
    select=Mass(density=0.3, head_adaptive=False, block=(32, 32), cache_lse=False),
    schedule=Schedule(refresh_every=2, dense_refresh=True),
)


def _inputs(step):
    generator = torch.Generator().manual_seed(step)
    return AttentionInputs(*(torch.randn(1, 256, 2, 16, generator=generator) * (1 + step) for _ in range(3)))


@pytest.fixture
def kernel_runs(monkeypatch):
    """As if torch's kernel were worth it: the steps in which it attends to all blocks."""
    runs, real = [], engines.kernel_over_all

    def counted(*given):
        call = given[0]
        _, kernel = real(*given)

        def run():
            runs.append(call.step.index)
            return kernel()

        return Choice("triton", "for a test"), run

    monkeypatch.setattr(engines, "kernel_over_all", counted)
    return runs


def test_a_step_that_another_cache_kept_short_searches_and_leaves_nothing(kernel_runs, monkeypatch):
    """The cache skips the layer in step 1 and 2: at step 3 its plan has served one step and is not due."""
    engine, given = Engine(RECIPE, ["layer"], "torch", 0), {}
    select = Mass.select

    def watched(self, blocks, tables, call, memory=None):
        given[call.step.index] = (memory.lse, call)
        return select(self, blocks, tables, call, memory)

    monkeypatch.setattr(Mass, "select", watched)
    for index in (0, 3, 4):
        inputs = _inputs(index)
        step = StepContext(index, 10, forward_id=index)
        attend(engine, 0, inputs, LAYOUT, step, lambda v=inputs.v: v)
    assert [*given] == [0, 4]
    assert kernel_runs == [0, 4]
    assert engine.records[0].sparse_calls == 1
    for lse, call in given.values():
        logits = torch.einsum("bqhd,bkhd->bhqk", call.q.double(), call.k.double()) / 4
        assert (lse - logits.logsumexp(-1)).abs().max() <= 1e-4
