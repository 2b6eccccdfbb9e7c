"""Any value of every axis with any other: refused when the recipe is made, with a sentence, or what its plan says."""

from __future__ import annotations

import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from tests.calls import attend, give_gates
from tests.properties.drawn import layouts, normal, seeds, times
from tests.properties.drawn_recipes import recipes
from tests.stages.plan_oracle import assert_attends


def not_dense() -> torch.Tensor:
    raise AssertionError("ran dense")


@times(6)
@given(
    recipes(runnable=True),
    st.one_of(layouts(6, extra=20, least=4, references=0), layouts(5, extra=20, least=2)),
    seeds,
    st.sampled_from(("all", "some", "one sequence has none")),
)
def test_a_recipe_computes_what_its_plan_says(recipe: Recipe | None, layout: TokenLayout, seed: int, seen: str):
    assume(recipe is not None)
    # Padding and gates of the layer's input have tests of their own (tests/training/test_vsa.py).
    assume(not recipe.order.pads and not recipe.compensate.reads_input)
    layout = layout if recipe.spans_references else layout.without_references()
    q, k, v = normal(seed, 3, 2, layout.seq_len, 2, 16)
    key_mask = None
    if seen != "all":
        key_mask = normal(seed + 1, 2, layout.seq_len) > -0.5
        key_mask[0] &= seen == "some"
    engine = Engine(recipe, ["layer"], "auto", 0)
    give_gates(engine, 2, 16)
    calls = []
    engine.observer = calls.append
    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), not_dense)
    left_out = not calls[0].plan.mask.to_tokens().all()
    event(f"{type(recipe.compensate).__name__}, {'something' if left_out else 'nothing'} left out")
    assert_attends(recipe, calls[0].plan, out, q, k, v, key_mask)
    assert engine.records[0].sparse_calls == 1
    assert not bool(engine.records[0].nan_calls)
