"""What calls leave undone while a CUDA graph is captured; on a GPU test_captured_gpu.py captures them."""

import pytest
import torch

from dit_accel import engine as engine_module
from dit_accel import presets
from dit_accel import run as run_module
from dit_accel import timing as timing_module
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run
from dit_accel.timing import Stopwatch
from tests.calls import attend

LAYOUT = TokenLayout((1, 16, 16), 16, 272)


def test_a_stopwatch_stands_still(monkeypatch):
    monkeypatch.setattr(timing_module, "is_captured", lambda _device: True)
    watch, device = Stopwatch(), torch.device("cuda", 0)
    begin = watch.start(device)
    assert begin is None
    assert watch.stop(begin, device) is None
    assert watch.seconds() == 0


def test_the_end_of_a_region_begins_the_next():
    first, second, device = Stopwatch(), Stopwatch(), torch.device("cpu")
    begin = first.start(device)
    middle = first.stop(begin, device)
    end = second.stop(middle, device)
    assert begin <= middle <= end
    assert first.seconds() + second.seconds() == pytest.approx(end - begin)


def test_a_captured_call_is_not_counted_and_a_later_one_is(monkeypatch):
    engine = Engine(presets.pooled(refresh_every=1000), ["layer"], "torch", 0)
    q, k, v = (torch.randn(1, LAYOUT.seq_len, 2, 16) for _ in range(3))

    def call(forward):
        step = StepContext(forward_id=forward)
        return attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda: q)

    before = call(0)
    monkeypatch.setattr(engine_module, "is_captured", lambda _device: True)
    assert torch.equal(call(1), before)
    assert engine.records[0].sparse_calls == 1
    assert len(engine.records[0].densities._parts) == 1
    monkeypatch.undo()
    call(2)
    assert engine.records[0].sparse_calls == 2


def test_a_key_mask_is_known_by_its_tensor_alone(monkeypatch):
    run, mask = Run(), torch.arange(272)[None] > 5
    kept = run.kept(LAYOUT, mask, 0)
    monkeypatch.setattr(run_module, "is_captured", lambda _device: True)
    assert run.kept(LAYOUT, mask, 1) is kept
    with pytest.raises(RuntimeError, match="a key mask must be the tensor that an earlier call had"):
        run.kept(LAYOUT, mask.clone(), 2)


def test_a_kept_plans_density_is_worked_out_once(monkeypatch):
    from dit_accel.kernels import BlockMask

    density, counted = BlockMask.density, []
    monkeypatch.setattr(BlockMask, "density", lambda mask: counted.append(mask) or density(mask))
    for preset in (presets.pooled(refresh_every=1000), presets.window()):
        counted.clear()
        engine = Engine(preset, ["layer"], "torch", 0)
        q, k, v = (torch.randn(1, LAYOUT.seq_len, 2, 16) for _ in range(3))
        for forward in range(4):
            step = StepContext(forward_id=forward)
            attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda q=q: q)
        assert len(counted) == 1
        record = engine.records[0]
        assert record.sparse_calls == 4
        assert record.density_sum == pytest.approx(4 * float(density(counted[0])))
