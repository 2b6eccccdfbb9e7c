"""What the host does in a call that a kept plan serves: each thing once, and no more of it than it needs."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dit_accel import presets
from dit_accel.call import AttentionCall, AttentionInputs, autocast_done
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Bounded, Run
from dit_accel.stages.precision import ModelDtype

LAYOUT = TokenLayout((1, 16, 16), 16, 272)
STEPS = 10


class Model:
    """Calls of two layers under one recipe, forward by forward of a run."""

    def __init__(self, preset: str) -> None:
        self.preset = preset
        self.engine = Engine(presets.resolve(preset), ["first", "second"], "torch", 0)
        self.run, self.forwards = Run(), 0
        self.calls: list[AttentionCall] = []
        self.engine.observer = self.calls.append
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, LAYOUT.seq_len, 2, 16, generator=generator) for _ in range(3))
        self.inputs = AttentionInputs(q, k, v)

    def forward(self, index: int, layers: int = 2) -> None:
        self.forwards += 1
        step = StepContext(index, STEPS, branch="cond", forward_id=self.forwards)
        for layer in range(layers):
            layout = TokenLayout((1, 16, 16), 16, 272)  # as each forward makes its own
            call = AttentionCall.of(layer, self.inputs, layout, step, self.run)
            self.engine.attend(call, lambda: self.inputs.v)


@pytest.fixture(params=["mass", "carried"])
def model(request):
    """A run whose plans are made, and have served once."""
    model = Model(request.param)
    with torch.no_grad():
        for index in range(7):
            model.forward(index)
    model.calls.clear()
    return model


def python_calls(work) -> Counter[str]:
    """Python functions that are called, by name."""
    found: Counter[str] = Counter()

    def seen(frame, event, _arg):
        if event == "call":
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return found


def test_what_a_run_keeps_is_looked_up_once_a_call(model, monkeypatch):
    asked = []
    kept = Run.kept
    monkeypatch.setattr(Run, "kept", lambda self, *args: asked.append(args) or kept(self, *args))
    with torch.no_grad():
        model.forward(7)
    assert len(asked) == 2


def test_a_kept_plan_is_one_object_for_all_the_calls_that_it_serves(model):
    with torch.no_grad():
        model.forward(7)
        model.forward(8)
    first, second, again, second_again = (call.plan for call in model.calls)
    assert first is again
    assert second is second_again
    assert first is not second


@pytest.mark.parametrize("preset", ["mass", "carried"])
def test_a_kept_plan_is_counted_once_and_another_one_anew(preset, monkeypatch):
    model = Model(preset)
    compensate, counted = model.engine.recipe.compensate, []
    density = type(compensate).density
    monkeypatch.setattr(type(compensate), "density", lambda self, plan: counted.append(plan) or density(self, plan))
    with torch.no_grad():
        for index in range(STEPS):
            model.forward(index)
    plans = [call.plan for call in model.calls if call.plan is not None]
    assert counted == list(dict.fromkeys(plans))
    assert len(counted) < len(plans)
    densities = [float(density(compensate, call.plan)) for call in model.calls if call.plan and call.layer == 0]
    assert model.engine.records[0].density_sum == pytest.approx(sum(densities))
    assert replace(plans[0], share=None).counted is None


def test_layers_of_a_forward_share_the_step_that_counts_their_forwards(model):
    with torch.no_grad():
        model.forward(7)
    first, second = (call.step for call in model.calls)
    assert first is second
    assert first.computed is not None
    # A layer that another package's cache skipped in a forward counts one less.
    with torch.no_grad():
        model.forward(8, layers=1)
        model.calls.clear()
        model.forward(9)
    first, second = (call.step.computed for call in model.calls)
    assert first == second + 1


def test_no_more_python_than_was_counted(model, monkeypatch):
    """Of the engine, with a call that is made and without its kernel; 3 % are left for other versions of Python."""
    model.engine.observer = None
    out = torch.zeros(1, LAYOUT.seq_len, 2, 16)
    monkeypatch.setattr(ModelDtype, "attend", lambda *_args: (out, out))
    with torch.no_grad():
        model.forward(7, layers=1)
        found = python_calls(lambda: model.forward(8, layers=1))
    assert found.total() <= (116 if model.preset == "mass" else 129), found


def test_no_autocast_makes_no_context(model):
    call = model.calls[0] if model.calls else AttentionCall.of(0, model.inputs, LAYOUT, StepContext(), Run())
    assert autocast_done(call) is autocast_done(call)
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_done(call) is not autocast_done(call)
        with autocast_done(call):
            assert call.q.dtype == torch.bfloat16
            assert not torch.is_autocast_enabled("cpu")


def test_the_newest_entry_is_found_by_what_equals_its_key_and_forgotten_with_the_rest():
    kept: Bounded[list[int]] = Bounded(2)
    first = kept.get(("layout", 0), list)
    assert kept.get(("lay" + "out", 0), list) is first
    second = kept.get(("layout", 1), list)
    assert second is not first
    assert kept.get(("layout", 0), list) is first  # now the newest: the next one drops the second
    kept.get(("layout", 2), list)
    assert kept.get(("layout", 0), list) is first
    assert kept.get(("layout", 1), list) is not second
    kept.clear()
    assert kept.get(("layout", 1), list) is not second
