"""What a schedule does to the engine's plans: searches, memory, drift, density along the trajectory."""

import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import Choice, block_sparse_attention
from dit_accel.kernels.mask.packed import PackedBlockMask
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.records import LayerRecord
from dit_accel.run import Run
from dit_accel.stages.drift import BlockMeans
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.calls import attend, call_of
from tests.stages.oracle import masked_attention

LAYOUT = TokenLayout((4, 8, 8), 0, 256)


def _inputs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 256, 2, 16, generator=generator) for _ in range(3)]


def _run(engine: Engine, tensors, steps: int, start: int = 0, sigmas=None, until: int | None = None) -> list[str]:
    """What each step did, to the end or to a step where the run is broken off: "dense" or "sparse"."""
    did = []
    engine.run = Run()
    for index in range(steps if until is None else until):
        q, k, v = tensors(index) if callable(tensors) else tensors
        sigma = None if sigmas is None else sigmas[index]
        step = StepContext(index=index, num_steps=steps, sigma=sigma, forward_id=start + index)
        before = engine.records[0].sparse_calls
        attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda v=v: v)
        did.append("sparse" if engine.records[0].sparse_calls > before else "dense")
    return did


def _plan(engine: Engine):
    """The only kept plan of the engine's run."""
    (kept,) = engine.run._kept.entries.values()
    (plan,) = kept.plans.values()
    return plan


def _memory(engine: Engine):
    """The memory of the only layer and branch of the engine's run."""
    (kept,) = engine.run._kept.entries.values()
    (memory,) = kept.memories.values()
    return memory


def test_adaspa_searches_twice_densely_and_remembers_the_lse():
    recipe = presets.adaspa(density=0.3, search_at=(0.2, 0.6), block=(32, 32))
    engine = Engine(recipe, ["layer"], "auto", 0)
    _run(engine, _inputs(1), 10, until=4)
    memory = _memory(engine)
    broken_off = memory.lse
    _run(engine, _inputs(), 10, start=10, until=4)
    memory = _memory(engine)
    first = memory.lse
    torch.testing.assert_close(first, _log_sum_exp(*_inputs()[:2]), atol=1e-5, rtol=1e-5)
    assert first is not broken_off, "a new run must not normalise with the last one's log-sum-exp"
    engine.records[0] = LayerRecord("layer")
    did = _run(engine, _inputs(), 10, start=20)
    assert [index for index, kind in enumerate(did) if kind == "dense"] == [0, 1, 2, 6]
    assert dict(engine.records[0].dense_calls) == {"dense phase": 2, "search step": 2}
    assert engine.records[0].plans_made == 2
    memory = _memory(engine)
    assert memory.lse is None, "no search is left that would need it"


def test_mass_searches_in_the_last_dense_step_and_keeps_its_plan_in_bits():
    recipe = presets.mass(density=0.3, block=(32, 32))
    for steps, dense in ((30, range(6)), (10, range(2)), (9, range(2))):
        engine = Engine(recipe, ["layer"], "auto", 0)
        for start in (0, steps):
            did = _run(engine, _inputs(start), steps, start=start)
            assert [index for index, kind in enumerate(did) if kind == "dense"] == list(dense), steps
        assert dict(engine.records[0].dense_calls)["search step"] == 2, "one search a run"
        assert engine.records[0].plans_made == 2
    kept = _plan(engine)
    assert isinstance(kept.mask, PackedBlockMask)
    q, k, _ = _inputs(start)
    blocks = SequenceBlocks(LAYOUT, recipe.order.rows(LAYOUT, q.device, 0), 32, 32, q.device)
    alone = recipe.select.select(blocks, None, call_of(q, k))
    assert torch.equal(kept.plan.mask.to_dense(), alone.to_dense())


@pytest.mark.parametrize("steps", [8, 4, 1])
def test_of_few_steps_none_is_dense(steps):
    """The first step searches, exactly as a dense one would, and its plan serves it."""
    recipe = presets.mass(density=0.3, block=(32, 32))
    engine = Engine(recipe, ["layer"], "auto", 0)
    q, k, v = _inputs()
    outs = []
    for index in range(steps):
        step = StepContext(index=index, num_steps=steps, forward_id=index)
        call = call_of(q, k)
        call.step, call.layout = step, LAYOUT
        # On a GPU a dense search runs dense attention for its log-sum-exp: here nobody would take its output.
        assert engine.planner.memory_of_search(call) is None
        outs.append(attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda: torch.full_like(v, torch.nan)))
    assert (engine.records[0].sparse_calls, dict(engine.records[0].dense_calls)) == (steps, {})
    assert engine.records[0].plans_made == 1
    rows = recipe.order.rows(LAYOUT, q.device, 0)
    blocks = SequenceBlocks(LAYOUT, rows, 32, 32, q.device)
    mask = recipe.select.select(blocks, None, call_of(q, k))
    assert torch.equal(_plan(engine).plan.mask.to_dense(), mask.to_dense())
    permuted = [x[:, rows].double() for x in (q, k, v)]
    keep = mask.to_dense().repeat_interleave(32, 2).repeat_interleave(32, 3)
    expected = torch.empty_like(permuted[2])
    expected[:, rows] = masked_attention(*permuted, keep)[0]
    for out in outs:
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_few_steps_can_have_a_dense_phase_where_a_recipe_asks_for_it():
    recipe = presets.mass(density=0.3, block=(32, 32)).with_fields({"schedule.few_steps": 0})
    assert _run(Engine(recipe, ["layer"], "auto", 0), _inputs(), 4) == ["dense", "sparse", "sparse", "sparse"]


@pytest.mark.parametrize("every", [2, 3])
def test_recycled_is_dense_in_turn_and_reads_what_the_last_dense_step_found(every):
    engine = Engine(presets.recycled(density=0.3, full_every=every, block=(32, 32)), ["layer"], "auto", 0)
    did = _run(engine, _inputs(), 7)
    assert [index for index, kind in enumerate(did) if kind == "dense"] == list(range(0, 7, every))
    assert engine.records[0].plans_made == len(range(0, 7, every))


def test_masformer_is_dense_in_its_full_layers():
    engine = Engine(presets.masformer(full_layers=(0, -1), dense_fraction=0.0), ["a", "b", "c"], "auto", 0)
    q, k, v = _inputs()
    step, dense = StepContext(index=0, num_steps=4, forward_id=1), []
    for layer in range(3):
        attend(engine, layer, AttentionInputs(q, k, v), LAYOUT, step, lambda: dense.append(0) or v)
    assert len(dense) == 2
    assert [sum(record.dense_calls.values()) for record in engine.records] == [1, 0, 1]
    own = presets.gna(dense_fraction=0.0)
    assert presets.masformer(full_layers=(), dense_fraction=0.0) == own


def test_a_repeated_forward_repeats_its_dense_search():
    engine = Engine(presets.sparsed(block=(32, 32)), ["layer"], "auto", 0)
    q, k, v = _inputs()
    step = StepContext(index=3, num_steps=10, forward_id=3)
    exact = _exact(q, k, v)
    for _ in range(2):
        out = attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda: exact.float())
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert engine.records[0].plans_made == 1
    assert dict(engine.records[0].dense_calls) == {"search step": 2}


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout((3, 8, 8), 64, 256)], ids=["alone", "text first"])
def test_a_plan_in_bits_hides_what_the_key_mask_hides(layout):
    recipe = presets.mass(density=0.3, block=(32, 32))
    engine = Engine(recipe, ["layer"], "auto", 0)
    q, k, v = _inputs()
    key_mask = torch.arange(256).expand(1, 256) >= 20
    outs = []
    for index in (1, 2):
        step = StepContext(index=index, num_steps=10, forward_id=index)
        outs.append(attend(engine, 0, AttentionInputs(q, k, v, key_mask[:, None, None]), layout, step, lambda: v))
    assert outs[0] is v, "the search step is the model's own attention here"
    kept = _plan(engine)
    rows = recipe.order.rows(layout, q.device, 0)
    blocks = SequenceBlocks(layout, rows, 32, 32, q.device)
    alone = recipe.select.select(blocks, None, call_of(q, k, key_mask=key_mask))
    assert torch.equal(kept.plan.mask.to_dense(), alone.to_dense())
    assert torch.equal(kept.plan.mask.kv_num_full, alone.kv_num_full)
    place = torch.empty(256, dtype=torch.long).scatter_(0, rows.long(), torch.arange(256))
    seen = alone.to_tokens()[..., place, :][..., place] & key_mask
    exact = masked_attention(q, k, v, seen)
    torch.testing.assert_close(outs[1].double(), exact, atol=1e-5, rtol=1e-5)


def _log_sum_exp(q, k):
    return (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5).logsumexp(-1).float()


def _exact(q, k, v, key_mask=None):
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / q.shape[-1] ** 0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.double())


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout((3, 8, 8), 64, 256)], ids=["alone", "text first"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", ["adaspa", "sparsed"])
@pytest.mark.parametrize("own", [False, True], ids=["the model's attention", "our attention"])
def test_a_search_step_is_exact_and_plans_what_two_passes_would(own, name, hidden, layout, monkeypatch):
    calls = []

    def ours(*args, backend, **options):
        calls.append(backend)
        return block_sparse_attention(*args, backend="torch", **options)

    if own:  # as on a GPU, where the search takes the log-sum-exp of the step's attention
        monkeypatch.setattr("dit_accel.dense_kernel.choose_backend", lambda *_, **__: Choice("triton", ""))
        monkeypatch.setattr("dit_accel.dense_kernel.block_sparse_attention", ours)
    recipe = getattr(presets, name)(density=0.3, block=(32, 32))
    engine = Engine(recipe, ["layer"], "auto", 0)
    q, k, v = _inputs()
    key_mask = torch.arange(256).expand(1, 256) >= (20 if hidden else 0)
    mask = key_mask[:, None, None] if hidden else None
    exact = _exact(q, k, v, key_mask)
    step = StepContext(index=4, num_steps=10, forward_id=4)
    searched = attend(engine, 0, AttentionInputs(q, k, v, mask), layout, step, lambda: exact.float())
    torch.testing.assert_close(searched.double(), exact, atol=1e-5, rtol=1e-5)
    assert len(calls) == (own and recipe.select.uses_lse(layout, key_mask if hidden else None))
    kept = _plan(engine)
    blocks = SequenceBlocks(layout, None, 32, 32, torch.device("cpu"))
    alone = recipe.select.select(blocks, None, call_of(q, k, key_mask=key_mask if hidden else None))
    assert torch.equal(kept.plan.mask.to_dense(), alone.to_dense())


def test_a_search_with_gradients_leaves_the_models_own_attention():
    engine = Engine(presets.adaspa(density=0.3, block=(32, 32)), ["layer"], "auto", 0)
    q, k, v = _inputs()
    step = StepContext(index=4, num_steps=10, forward_id=4)
    out = attend(engine, 0, AttentionInputs(q.requires_grad_(), k, v), LAYOUT, step, lambda: v)
    assert out is v


def test_layers_of_one_forward_share_a_static_plan_also_with_hidden_keys():
    engine = Engine(Recipe(select=Window(window=(1.0, 0.5, 0.5), block=(32, 32))), ["a", "b"], "auto", 0)
    q, k, v = _inputs()
    mask = (torch.arange(256) < 250).expand(1, 1, 1, 256)
    for forward, hidden in enumerate((mask, mask, mask.clone())):
        for layer in range(2):
            step = StepContext(index=5 + forward, num_steps=10, forward_id=forward)
            attend(engine, layer, AttentionInputs(q, k, v, hidden), LAYOUT, step, lambda: v)
    assert [record.plans_made for record in engine.records] == [1, 0], "one plan for both layers and all forwards"
    step = StepContext(index=8, num_steps=10, forward_id=3)
    other = (torch.arange(256) < 100).expand(1, 1, 1, 256)
    attend(engine, 1, AttentionInputs(q, k, v, other), LAYOUT, step, lambda: v)
    assert engine.records[1].plans_made == 1, "another mask, another plan"


def test_drift_below_the_bound_keeps_the_plan_and_above_it_makes_another():
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)), schedule=Schedule(drift_bound=0.2))
    base, other = _inputs(0), _inputs(1)

    def drifting(index: int) -> list[torch.Tensor]:
        weight = 0.05 * index
        return [(1 - weight) * now + weight * then for now, then in zip(base, other, strict=True)]

    engine = Engine(recipe, ["layer"], "auto", 0)
    _run(engine, drifting, 10)
    expected, made = 0, None
    for index in range(10):
        q, k, _ = drifting(index)
        means = [x[0].unflatten(0, (-1, 32)).mean(1).double() for x in (q, k)]
        if made is not None:
            change = max(
                float((now - then).abs().sum() / then.abs().sum()) for now, then in zip(means, made, strict=True)
            )
        if made is None or change > 0.2:
            expected, made = expected + 1, means
    assert 1 < expected < 10
    assert engine.records[0].plans_made == expected


def test_without_change_a_guarded_plan_lasts_and_its_age_may_be_limited():
    select = Pooled(density=0.3, block=(32, 32))
    for schedule, plans in (
        (Schedule(drift_bound=0.01), 1),
        (Schedule(drift_bound=0.01, refresh_every=4), 3),
        (Schedule(drift_bound=0.01, refresh_at=(0.5,)), 2),
    ):
        engine = Engine(Recipe(select=select, schedule=schedule), ["layer"], "auto", 0)
        _run(engine, _inputs(), 12)
        assert engine.records[0].plans_made == plans


def test_block_means_ignore_hidden_keys():
    q, k, _ = _inputs()
    key_mask = torch.ones(1, 256, dtype=torch.bool)
    key_mask[:, 250:] = False
    before = BlockMeans.of(call_of(q, k, key_mask=key_mask), (32, 32))
    k = k.clone()
    k[:, 250:] = torch.nan
    assert float(BlockMeans.of(call_of(q, k, key_mask=key_mask), (32, 32)).change_since(before, call_of(q, k))) == 0.0


def test_density_points_are_interpolated_and_reach_the_mask():
    points = ((0.5, 0.5), (0.0, 1.0), (0.9, 0.1))
    schedule = Schedule(density_points=points)
    densities = [schedule.density(StepContext(index=i, num_steps=10)) for i in range(10)]
    expected = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert densities == pytest.approx(expected)
    by_sigma = Schedule(density_points=((0.2, 0.1), (0.8, 0.7)), density_over="sigma")
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.05]
    found = [by_sigma.density(StepContext(index=0, num_steps=5, sigma=sigma)) for sigma in sigmas]
    assert found == pytest.approx([0.7, 0.7, 0.4, 0.1, 0.1])
    assert by_sigma.density(StepContext(index=0, num_steps=5)) is None
    select = Mass(density=0.01, head_adaptive=False, block=(32, 32))
    engine = Engine(Recipe(select=select, schedule=by_sigma), ["layer"], "auto", 0)
    seen, total = [], 0.0
    for sigma in sigmas:
        _run(engine, _inputs(), 1, sigmas=[sigma])
        seen.append(float(engine.records[0].density_sum) - total)
        total += seen[-1]
    # 8 key blocks: 6, 6, 4, 1 and 1 of them, and the own one where it is not among them
    low = [6 / 8, 6 / 8, 4 / 8, 1 / 8, 1 / 8]
    assert all(a - 1e-6 <= b <= a + 1 / 8 for a, b in zip(low, seen, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density_points": ((0.0, 0.0),)}, r"densities in \(0, 1\], got 0.0"),
        ({"density_points": ((0.1, 0.5), (0.1, 0.2))}, "must differ in position"),
        ({"density_over": "step"}, "must be progress or sigma, got 'step'"),
        ({"drift_bound": 0.0}, "drift_bound must be above 0, got 0.0"),
    ],
)
def test_impossible_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)


def test_density_points_need_a_selection_with_a_density():
    with pytest.raises(ValueError, match="need a selection with a density, got Window"):
        Recipe(select=Window(), schedule=Schedule(density_points=((0.0, 0.5),)))


def test_density_points_by_name():
    recipe = presets.pooled().with_fields({"schedule.density_points": "((0.0, 0.5), (1.0, 0.1))"})
    assert recipe.schedule.density_points == ((0.0, 0.5), (1.0, 0.1))
    assert Recipe.from_dict(recipe.to_dict()) == recipe
