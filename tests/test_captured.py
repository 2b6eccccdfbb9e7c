"""What calls leave undone while a CUDA graph is captured; on a GPU test_captured_gpu.py captures them."""

import gc
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch

from dit_accel import call as call_module
from dit_accel import engine as engine_module
from dit_accel import presets
from dit_accel import run as run_module
from dit_accel import timing as timing_module
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import BlockMask
from dit_accel.kernels.mask import packed
from dit_accel.kernels.mask import query_pairs as query_pairs_module
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.run import Run
from dit_accel.step_log import StepLog
from dit_accel.timing import Stopwatch
from tests.calls import attend

LAYOUT = TokenLayout((1, 16, 16), 16, 272)


MODULES = (call_module, run_module, timing_module, packed, query_pairs_module)


@contextmanager
def capture():
    """What a captured call sees."""
    with pytest.MonkeyPatch.context() as patched:
        for module in MODULES:
            patched.setattr(module, "is_captured", lambda _device: True)
        yield


class Layer:
    """A layer's calls, each of a forward of its own."""

    def __init__(self, recipe):
        self.engine = Engine(recipe, ["layer"], "torch", 0)
        self.forwards = 0

    def call(self, seed, step=None, num_steps=None, key_mask=None):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, LAYOUT.seq_len, 2, 16, generator=generator) for _ in range(3))
        self.forwards += 1
        at = StepContext(step, num_steps, forward_id=self.forwards)

        def dense():
            out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            return out.transpose(1, 2)

        return attend(self.engine, 0, AttentionInputs(q, k, v, key_mask), LAYOUT, at, dense)

    def kept(self, key_mask=None):
        return self.engine.run.kept(LAYOUT, key_mask, self.forwards)


@pytest.mark.parametrize("key_mask", [None, torch.arange(272)[None] > 5], ids=["", "key mask"])
@pytest.mark.parametrize("preset", ["pooled", "mass", "window", "carried"])
def test_what_a_captured_call_makes_serves_no_other(preset, key_mask):
    """Nothing was computed yet when the capture ends, and each replay writes something else to the same memory."""
    recipe = presets.resolve(preset)
    if preset in ("pooled", "mass"):
        recipe = recipe.with_fields({"schedule": "schedule", "schedule.refresh_every": 2})
    layer, alone = Layer(recipe), Layer(recipe)
    for seed, step in ((0, 1), (1, 2)):
        layer.call(seed, step, 10, key_mask)
        alone.call(seed, step, 10, key_mask)
    before = dict(layer.kept(key_mask).plans)
    difference = [memory.left_out for memory in layer.kept(key_mask).memories.values()]
    with capture():
        layer.call(7, 5, 10, key_mask)  # a plan is due, and a dense step of carried
    assert layer.kept(key_mask).plans == before
    assert [memory.left_out for memory in layer.kept(key_mask).memories.values()] == difference
    assert torch.equal(layer.call(2, 6, 10, key_mask), alone.call(2, 6, 10, key_mask))


def test_the_first_call_of_a_layout_leaves_no_static_plan():
    layer = Layer(presets.window())
    layer.call(0)
    (prepared,) = (one for kept in layer.engine.planner.tables._prepared.entries.values() for one in kept.values())
    prepared.plans.clear()
    with capture():
        layer.call(1)
    assert not prepared.plans
    layer.call(2)
    assert len(prepared.plans) == 1


def _stays_as_long_as_the_patch(layer, read):
    """What weak references in ``read`` are of is there after the run and after other layouts, and goes at the end."""
    layer.engine.run = Run()
    layer.engine.planner.tables.clear()
    gc.collect()
    assert all(one() is not None for one in read)
    layer.engine.planner.forget()
    gc.collect()
    assert all(one() is None for one in read)


@pytest.mark.parametrize("preset", ["pooled", "carried"])
def test_what_a_graph_reads_stays_as_long_as_the_patch(preset):
    """Its replays read the plan's memory, also after the run that made the plan."""
    recipe = presets.resolve(preset)
    if preset == "pooled":
        recipe = recipe.with_fields({"schedule": "schedule", "schedule.refresh_every": 1000})
    layer = Layer(recipe)
    for step in (1, 2):
        layer.call(step, step, 10)
    (kept,) = layer.kept().plans.values()
    read = [weakref.ref(kept.mask.lists().kv_indices), weakref.ref(kept.mask.kept)]
    if preset == "carried":
        (memory,) = layer.kept().memories.values()
        read.append(weakref.ref(memory.left_out.difference))
        del memory
    del kept
    with capture():
        layer.call(3, 3, 10)
    _stays_as_long_as_the_patch(layer, read)


def _tables(engine):
    """What an engine keeps of its layouts, by kind."""
    tables = engine.planner.tables
    return {
        "blocks": [one for kept in tables._prepared.entries.values() for one in kept.values()],
        "padding": [*tables._padding.entries.values()],
        "order": [*tables._order_tables.entries.values()],
        "full mask": [*tables._full_masks.entries.values()],
    }


TABLES = [
    ("window", {}, 5, {"blocks"}),
    ("pooled", {"order": "cubes", "order.shape": (1, 1, 32), "select.block": (32, 32)}, 5, {"blocks", "padding"}),
    ("pbs", {}, 5, {"order"}),
    ("window", {"schedule": "schedule", "schedule.dense_fraction": 0.3, "schedule.own_dense": True}, 1, {"full mask"}),
]


@pytest.mark.parametrize(
    ("preset", "fields", "step", "kinds"), TABLES, ids=["blocks", "padding", "order", "all blocks"]
)
def test_tables_that_a_graph_reads_stay_when_other_layouts_take_their_place(monkeypatch, preset, fields, step, kinds):
    monkeypatch.setattr(engine_module, "keeps_up_with_dense", lambda _choice: True)
    layer = Layer(presets.resolve(preset).with_fields(fields))
    layer.call(0, step, 10)
    found = _tables(layer.engine)
    assert {kind for kind in kinds if found[kind]} == kinds
    read = [weakref.ref(one) for kind in kinds for one in found[kind]]
    del found
    with capture():
        layer.call(1, step, 10)
    _stays_as_long_as_the_patch(layer, read)


@pytest.mark.parametrize(
    ("preset", "fields", "step", "kinds"), TABLES, ids=["blocks", "padding", "order", "all blocks"]
)
def test_tables_that_a_graph_makes_serve_no_other_call(monkeypatch, preset, fields, step, kinds):
    monkeypatch.setattr(engine_module, "keeps_up_with_dense", lambda _choice: True)
    layer = Layer(presets.resolve(preset).with_fields(fields))
    with capture(), suppress(RuntimeError):  # a mask of padding that nobody has seen before
        layer.call(0, step, 10)
    assert not any(_tables(layer.engine).values())
    layer.call(1, step, 10)
    assert {kind for kind, found in _tables(layer.engine).items() if found} >= kinds


def test_lists_of_bits_that_a_graph_packed_are_made_anew():
    drawn = torch.rand(2, 1, 2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    first, second = (BlockMask.from_dense(keep, 16, 16, 140, 140, backend="torch") for keep in drawn)
    with capture():
        mask = packed.PackedBlockMask.of(first, key_mask=False)
        assert torch.equal(mask.lists().to_dense(), first.to_dense())
    assert int(mask.longest) == 9  # nobody waited for what it will be
    assert torch.equal(mask.lists().to_dense(), first.to_dense())
    mask.kept.numpy()[...] = packed.pack_bits(second.to_dense()).numpy()  # a replay, which counts no version
    assert torch.equal(mask.lists().to_dense(), second.to_dense())


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
    monkeypatch.setattr(call_module, "is_captured", lambda _device: True)
    assert torch.equal(call(1), before)
    assert engine.records[0].sparse_calls == 1
    assert len(engine.records[0].densities._parts) == 1
    monkeypatch.undo()
    call(2)
    assert engine.records[0].sparse_calls == 2


def test_a_captured_call_that_is_dense_or_plans_is_not_counted():
    layer = Layer(presets.carried())
    (record,) = layer.engine.records

    def counts():
        steps = [(one.dense_calls, one.sparse_calls, one.plans_made) for one in layer.engine.steps.records()]
        return dict(record.dense_calls), record.sparse_calls, record.plans_made, str(steps)

    layer.engine.steps = StepLog()
    for step in (0, 1, 2):  # dense phase, search, sparse
        layer.call(step, step, 30)
    before = counts()
    assert before[:3] == ({"dense phase": 1, "search step": 1}, 1, 1)
    with capture():
        for step in (0, 15, 16):
            layer.call(step, step, 30)
    assert counts() == before


def test_a_key_mask_is_known_by_its_tensor_alone(monkeypatch):
    run, mask = Run(), torch.arange(272)[None] > 5
    kept = run.kept(LAYOUT, mask, 0)
    monkeypatch.setattr(run_module, "is_captured", lambda _device: True)
    assert run.kept(LAYOUT, mask, 1) is kept
    with pytest.raises(RuntimeError, match="a key mask must be the tensor that an earlier call had"):
        run.kept(LAYOUT, mask.clone(), 2)


@pytest.mark.parametrize("preset", ["pooled", "mass"])
def test_a_captured_call_that_keeps_no_plan_needs_no_known_key_mask(preset):
    """Its plan is made in the graph, at each replay, and nothing that a run keeps is read."""
    recipe = presets.resolve(preset, density=0.5).with_fields({"schedule": "schedule", "select.block": (32, 32)})
    layer, hidden = Layer(recipe), torch.arange(LAYOUT.seq_len)[None] > 40
    expected = layer.call(1, key_mask=hidden)
    with capture():
        assert torch.equal(layer.call(1, key_mask=hidden), expected)


def test_a_kept_plans_density_is_worked_out_once(monkeypatch):
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
