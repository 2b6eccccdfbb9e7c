"""Allocation against exhaustive search, and measured errors against forwards of their own."""

import itertools

import pytest
import torch

from dit_accel import Recipe, patch
from dit_accel.calibration.allocation import allocate
from dit_accel.calibration.head_errors import HeadErrors, _curve_tap, measure_heads
from dit_accel.calibration.recording import first_forwards, record_inputs
from dit_accel.calibration.search import search, with_densities
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.presets import resolve
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.grid import Circle
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
from tests.calls import attend
from tests.stages.oracle import masked_attention
from tests.tiny import TINY

DENSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _errors(curves, kept=None):
    """Of one layer with the heads' curves."""
    error = torch.tensor([curves], dtype=torch.float64)
    kept = torch.tensor(DENSITIES, dtype=torch.float64).expand_as(error) if kept is None else kept
    return HeadErrors(DENSITIES, kept, error)


def _falling(seed, heads=3, convex=True):
    generator = torch.Generator().manual_seed(seed)
    drops = torch.rand(heads, len(DENSITIES) - 1, generator=generator, dtype=torch.float64)
    drops *= torch.logspace(0, 2, heads, dtype=torch.float64)[:, None]
    drops = drops.sort(dim=-1, descending=True).values if convex else drops
    return torch.cat([drops.flip(-1).cumsum(-1).flip(-1), torch.zeros(heads, 1)], -1).tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mean", [0.2, 0.3, 0.5])
def test_on_convex_curves_no_grid_choice_is_better(seed, mean):
    curves = _falling(seed)
    errors = _errors(curves)
    (found,) = allocate(errors, mean_density=mean)
    assert sum(found) / 3 == pytest.approx(mean, abs=1e-6)
    best = min(
        sum(curve[place] for curve, place in zip(curves, places, strict=True))
        for places in itertools.product(range(10), repeat=3)
        if sum(DENSITIES[place] for place in places) <= 3 * mean + 1e-9
    )
    assert errors.predicted((found,)) ** 2 <= best + 1e-9
    assert errors.predicted(((mean,) * 3,)) >= errors.predicted((found,))


@pytest.mark.parametrize("seed", range(4))
def test_on_any_falling_curves_the_target_density_is_met_and_uniform_is_not_better(seed):
    errors = _errors(_falling(seed, heads=8, convex=False))
    (found,) = allocate(errors, mean_density=0.4)
    assert errors.kept_at((found,)) == pytest.approx(0.4, abs=1e-6)
    assert len(set(found)) > 1


@pytest.mark.parametrize("bound", [0.5, 2.0, 10.0])
def test_an_error_bound_is_met_with_as_few_blocks_as_a_density_of_that_error(bound):
    errors = _errors(_falling(7))
    found = allocate(errors, max_error=bound)
    assert errors.predicted(found) == pytest.approx(bound, rel=1e-3)
    again = allocate(errors, mean_density=errors.kept_at(found))
    assert errors.predicted(again) == pytest.approx(bound, rel=1e-3)


def test_blocks_that_are_kept_anyway_are_counted():
    kept = torch.tensor([[[max(share, 0.35) for share in DENSITIES]] * 3], dtype=torch.float64)
    errors = _errors(_falling(1), kept)
    with pytest.raises(ValueError, match=r"\[0.35.*, 1\], got 0.3"):
        allocate(errors, mean_density=0.3)
    assert errors.kept_at(allocate(errors, mean_density=0.5)) == pytest.approx(0.5, abs=1e-6)


def test_targets_exclude_each_other():
    errors = _errors(_falling(1))
    with pytest.raises(ValueError, match="mean_density or max_error"):
        allocate(errors)
    with pytest.raises(ValueError, match="mean_density or max_error"):
        allocate(errors, mean_density=0.5, max_error=1.0)


SELECTS = [Pooled(density=0.3, block=(32, 32)), Mass(density=0.3, head_adaptive=False, block=(32, 32))]


@pytest.mark.parametrize("select", SELECTS, ids=["pooled", "mass"])
def test_measured_errors_are_those_of_one_sparse_head(select):
    tiny = TINY["wan"]
    pipe = tiny.build(2)
    model = pipe.transformer
    recipe = Recipe(order=Tiles((2, 4, 4)), select=select)
    inputs = record_inputs(model, lambda: tiny.run(pipe), lambda number: number in (0, 3))
    assert len(inputs) == 2
    seen = []
    errors = measure_heads(
        model, recipe, inputs, densities=(0.1, 0.6), probe=0.3, progress=lambda done, total: seen.append((done, total))
    )
    assert errors.densities == (0.1, 0.3, 0.6, 1.0)
    assert errors.error.shape == errors.kept.shape == (2, 2, 4)
    assert seen[-1] == (2 * (1 + 4), 2 * (1 + 4))
    assert (errors.error[..., -1] == 0).all()
    assert (errors.kept.diff(dim=-1) > 0).all()
    for layer, head in itertools.product(range(2), range(2)):
        shares = [[1.0, 1.0], [1.0, 1.0]]
        shares[layer][head] = 0.3
        alone = with_densities(recipe, tuple(map(tuple, shares)))
        expected = []
        for arguments in inputs:
            with torch.no_grad():
                exact = model(**arguments)[0].double()
                with patch(model, alone) as handle:
                    changed = model(**arguments)[0].double()
            assert handle.summary().sparse_calls == 2
            expected.append(float((changed - exact).square().sum() / exact.square().sum()))
        # The other heads ran through the sparse kernel at density 1 there: float32 rounding of a forward.
        assert float(errors.error[layer, head, 1]) == pytest.approx(sum(expected) / 2, rel=1e-2)


def test_errors_in_several_orders_are_those_of_each_alone_and_the_best_is_chosen():
    tiny = TINY["wan"]
    pipe = tiny.build(2)
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    inputs = record_inputs(pipe.transformer, lambda: tiny.run(pipe), lambda number: number == 2)
    orders = ("fhw", "whf", "tiles")
    options = {"densities": (0.3, 0.6), "probe": 0.3}
    errors = measure_heads(pipe.transformer, recipe, inputs, orders=orders, **options)
    alone = [measure_heads(pipe.transformer, recipe, inputs, orders=(name,), **options) for name in orders]
    # What the first order's errors do to the velocity is taken for the others too: shares of it must agree.
    for place, single in enumerate(alone):
        ratio = errors.by_order[place][..., 0] / errors.by_order[place][..., 1]
        torch.testing.assert_close(ratio, single.error[..., 0] / single.error[..., 1], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(errors.by_order[0], alone[0].error)
    assert torch.equal(errors.error, errors.by_order.amin(0))
    chosen = errors.best_orders([[0.3] * 2] * 2)
    for layer, head in itertools.product(range(2), range(2)):
        by_order = {name: float(errors.by_order[n, layer, head, 0]) for n, name in enumerate(orders)}
        assert by_order[chosen[layer][head]] == min(by_order.values())
    assert len({name for layer in chosen for name in layer}) > 1


def test_a_search_measures_the_first_forward_of_steps_after_the_dense_phase():
    tiny = TINY["wan"]
    pipe = tiny.build(1)
    told, seen = [], []
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)), schedule=Schedule(dense_fraction=0.5))
    keep = first_forwards(pipe, 2, 0.5)

    def watch(number):
        seen.append((len(pipe.scheduler.timesteps), keep(number)))
        return False

    record_inputs(pipe.transformer, lambda: tiny.run(pipe, steps=8), watch)
    taken = [number for number, (_, kept) in enumerate(seen) if kept]
    forwards = len(seen) // 8
    assert taken == [5 * forwards, 7 * forwards]
    found = search(
        pipe,
        [tiny.call(torch.Generator().manual_seed(0))],
        recipe,
        mean_density=0.7,
        samples=1,
        densities=(0.3, 0.6),
        generate_kwargs={"num_inference_steps": 2},
        progress=told.append,
    )
    assert found.density == pytest.approx(0.7, abs=1e-5)
    assert found.predicted_error <= found.predicted_uniform + 1e-12
    assert found.recipe.schedule == recipe.schedule
    assert told[-1].done == told[-1].total
    assert told[-1].seconds_left == 0.0


@pytest.mark.parametrize(
    ("target", "probe"), [({"mean_density": 0.05}, 0.05), ({"mean_density": 0.3}, 0.1), ({"max_error": 0.1}, 0.1)]
)
def test_heads_are_probed_where_their_errors_are_large(target, probe, monkeypatch):
    from dit_accel.calibration import search as module

    def refuse(model, recipe, inputs, **options):
        raise RuntimeError(f"probed at {options['probe']}")

    monkeypatch.setattr(module, "measure_heads", refuse)
    monkeypatch.setattr(module, "least_kept", lambda *arguments: torch.zeros(1))
    tiny = TINY["wan"]
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    call = tiny.call(torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=f"probed at {probe}$"):
        search(tiny.build(1), [call], recipe, samples=1, generate_kwargs={"num_inference_steps": 2}, **target)


def test_a_recipe_file_comes_back_and_what_is_none_is_named(tmp_path):
    recipe = with_densities(Recipe(select=Pooled(block=(32, 32))), ((0.2, 0.9),))
    recipe.save(tmp_path / "deep" / "found.json")
    assert Recipe.load(tmp_path / "deep" / "found.json") == recipe
    assert resolve(str(tmp_path / "deep" / "found.json")) == recipe
    for text in ("[1, 2]", "{", '{"order": 3}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no recipe"):
            Recipe.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="There is no recipe file"):
        resolve(str(tmp_path / "none.json"))


def test_densities_per_head_reach_the_masks():
    tiny = TINY["wan"]
    pipe = tiny.build(2)
    shares = ((0.2, 0.9), (0.5, 1.0))
    recipe = with_densities(Recipe(select=Pooled(density=0.5, block=(32, 32))), shares)
    assert recipe.select.density == 0.65
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    kept = {}
    with patch(pipe, recipe) as handle:

        def watch(_, call):
            kept[call.layer] = call.plan.mask.to_dense().double().mean((0, 2, 3)).tolist()

        with handle.observe(watch):
            tiny.run(pipe, steps=1)
    # 4 x 4 blocks: a row keeps at least its share of 4, rounded up, and its own block.
    for layer, row in enumerate(shares):
        for share, found in zip(row, kept[layer], strict=True):
            least = -(-share * 4 // 1) / 4
            assert least <= found <= min(1.0, least + 0.25)


def test_bad_densities_and_selections():
    with pytest.raises(ValueError, match=r"head_densities must hold shares in \(0, 1\]"):
        Pooled(head_densities=((0.2, 1.5),))
    with pytest.raises(ValueError, match="both set the density"):
        Recipe(select=Pooled(head_densities=((0.2,),))).with_fields({"schedule.density_points": ((0.5, 0.2),)})
    pipe = TINY["wan"].build(2)
    with pytest.raises(ValueError, match="Circle has no density per head"):
        measure_heads(pipe.transformer, Recipe(select=Circle()), [{}])
    for bad, words in ((((0.2, 0.3, 0.4),), "are for 3 heads, the layer has 2"), (((0.2,),) * 1, None)):
        with patch(pipe, Recipe(select=Pooled(head_densities=bad, block=(32, 32)))):
            if words is None:
                TINY["wan"].run(pipe, steps=1)
            else:
                with pytest.raises(ValueError, match=words):
                    TINY["wan"].run(pipe, steps=1)


@pytest.mark.parametrize("orders", [(), ("fhw", "tiles")])
@pytest.mark.parametrize("wanted", [0.2, 0.01])
def test_a_density_that_no_head_can_keep_is_refused_before_the_runs(wanted, orders):
    """Blocks of 32 of 126 tokens: every query block reads its own and the best one, mostly two of four."""
    tiny, told = TINY["wan"], []
    pipe = tiny.build(2)
    pipe.set_progress_bar_config(disable=True)
    forwards = []
    pipe.transformer.register_forward_hook(lambda *arguments: forwards.append(1))
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    call = tiny.call(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=rf"mean_density must lie in \[0\.[345]\d+, 1\], got {wanted}: .* its own"):
        search(pipe, [call, call], recipe, mean_density=wanted, orders=orders, progress=told.append)
    # A forward for each order, and not one denoising step.
    assert len(forwards) == max(1, len(orders))
    assert [state.stage for state in told] == ["dense runs"]


def test_a_density_below_the_mean_of_what_heads_keep_is_refused_before_heads_are_measured():
    tiny = TINY["wan"]
    pipe = tiny.build(1)
    inputs = record_inputs(pipe.transformer, lambda: tiny.run(pipe), lambda number: number == 2)
    done = []
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    with pytest.raises(ValueError, match=r"mean_density must lie in \[0\.\d+, 1\], got 0.1"):
        measure_heads(
            pipe.transformer, recipe, inputs, mean_density=0.1, progress=lambda number, total: done.append(number)
        )
    assert done == [1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean_density": float("nan")}, "mean_density must lie in"),
        ({"max_error": float("nan")}, "max_error must be above 0 and finite"),
        ({"max_error": float("inf")}, "max_error must be above 0 and finite"),
        ({"max_error": 0.1, "orders": ("xyz",)}, "order.axes must hold fhw"),
        ({}, "give mean_density or max_error"),
    ],
)
def test_what_needs_no_run_is_refused_before_it(options, words):
    pipe = TINY["wan"].build(1)
    pipe.transformer.register_forward_pre_hook(lambda *arguments: pytest.fail("the model ran"))
    call = TINY["wan"].call(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=words):
        search(pipe, [call], Recipe(select=Pooled(density=0.3)), **options)


@pytest.mark.parametrize("masked", ["nothing", "keys", "pairs"])
def test_what_a_call_hides_is_hidden_from_the_measured_recipe_too(masked):
    """At density 1 nothing is left out, so there is no error, whatever the mask."""
    layout = TokenLayout((1, 8, 12), 4, 100)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 100, 2, 16, generator=generator)
    shape = {"nothing": None, "keys": (1, 100), "pairs": (100, 100)}[masked]
    mask = None if shape is None else torch.rand(shape, generator=generator) > 0.3
    exact = masked_attention(q, k, v, torch.ones(100, 100, dtype=torch.bool) if mask is None else mask).float()
    dense = Engine(Recipe(), ["layer"], "auto", 0)
    sparse = Engine(Recipe(select=Pooled(density=1.0, block=(32, 32))), ["layer"], "auto", 0)
    curves, kept = torch.ones(2, 1, 1, 2, 1, dtype=torch.float64)
    dense.output_tap = _curve_tap(dense, [[sparse]], curves, kept)
    out = attend(dense, 0, AttentionInputs(q, k, v, mask), layout, StepContext(), lambda: exact)
    assert out is exact
    assert kept.eq(1).all()
    assert curves.max() <= exact.numel() * (4e-6 * exact.abs().max()) ** 2
