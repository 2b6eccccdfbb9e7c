"""What stages say of themselves, and that a new one is a class and an entry in a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import BlockMask
from dit_accel.layout import StepContext
from dit_accel.plan import SequenceBlocks
from dit_accel.recipe import COMPENSATIONS, ORDERS, PRECISIONS, SELECTS
from dit_accel.stages.compensate.protocol import Compensation
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.protocol import Order
from dit_accel.stages.precision import Int8, ModelDtype
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.grid import Circle
from dit_accel.stages.select.mass import FrozenMass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.protocol import Select
from dit_accel.stages.select.static import DenseSelect, FullSelect
from tests.calls import attend, call_of
from tests.stages.block_oracle import CPU, LAYOUTS, half_hidden, inputs
from tests.stages.oracle import masked_attention
from tests.test_imports_one_way import PACKAGE

LAYOUT = LAYOUTS["text first"]


@pytest.mark.parametrize("kind", SELECTS.values(), ids=SELECTS)
def test_what_a_selection_says_of_its_densities_is_what_its_fields_are(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    select = kind()
    assert select.has_density == ("density" in names)
    assert select.has_head_densities == ("head_densities" in names)
    assert select.head_densities == ()
    if not select.has_density:
        assert select.density is None
        with pytest.raises(ValueError, match=f"{kind.__name__} has no density to set, got 0.3"):
            select.with_density(0.3)
        return
    assert select.with_density(0.3) == dataclasses.replace(select, density=0.3)
    if select.has_head_densities:
        heads = dataclasses.replace(select, head_densities=((0.1, 0.2), (0.3, 0.4)))
        assert heads.of_layer(1) == dataclasses.replace(select, head_densities=((0.3, 0.4),))
        assert heads.with_density(0.3) == dataclasses.replace(select, density=0.3), "one density for all heads"
    else:
        assert select.of_layer(5) is select


def test_nobody_but_the_table_asks_for_the_dense_selection():
    users = [path for path in PACKAGE.rglob("*.py") if "DenseSelect" in path.read_text(encoding="utf-8")]
    assert {str(path.relative_to(PACKAGE)) for path in users} == {"recipe.py", "stages/select/static.py"}


def test_a_dense_selection_is_one_like_others():
    select = DenseSelect()
    q, k = inputs(LAYOUT)
    key_mask = half_hidden(LAYOUT)
    masks = []
    for kind in (select, FullSelect(block=select.block)):
        blocks = SequenceBlocks(LAYOUT, None, *kind.block, CPU)
        call = call_of(q, k, key_mask=key_mask)
        masks.append(kind.select(blocks, kind.prepare(blocks), call).to_dense())
        assert kind.scores(blocks, None, call).equal(masks[-1].float())
    assert masks[0].equal(masks[1])
    assert Recipe().to_dict()["select"] == {"kind": "dense"}, "its block is no setting"
    assert Recipe().with_fields({"select": "dense"}) == Recipe()


@pytest.mark.parametrize("hidden", [False, True])
def test_a_dense_recipe_runs_the_models_own_attention(hidden):
    q, k = inputs(LAYOUT)
    engine = Engine(Recipe(), ["layer"], "auto", 0)
    given = AttentionInputs(q, k, k, half_hidden(LAYOUT) if hidden else None)
    assert attend(engine, 0, given, LAYOUT, StepContext(), lambda: k) is k
    assert dict(engine.records[0].dense_calls) == {"recipe is dense": 1}
    assert engine.planner.choices(None, "fa4") == {}, "nothing of ours runs"


@dataclass(frozen=True)
class OwnBlock(Select):
    """Every block reads itself alone."""

    block: tuple[int, int] = (32, 32)

    def select(self, blocks, _tables, call, _memory=None):
        keep = torch.eye(blocks.num_blocks[0], dtype=torch.bool)[None, None]
        length = blocks.layout.seq_len
        return BlockMask.from_dense(keep, *self.block, length, length, backend=call.backend("selection"))


@dataclass(frozen=True)
class Backwards(Order):
    def rows(self, layout, device, _layer=0):
        return torch.arange(layout.seq_len, device=device, dtype=torch.int32).flip(0)


@dataclass(frozen=True)
class Doubled(Compensation):
    is_static: ClassVar[bool] = True

    def attend(self, _call, _plan, sparse):
        out, witness = sparse()
        return out * 2, witness


@dataclass(frozen=True)
class Plain(ModelDtype):
    pass


def test_a_new_stage_is_a_class_and_an_entry(monkeypatch):
    for table, kind in ((SELECTS, OwnBlock), (ORDERS, Backwards), (COMPENSATIONS, Doubled), (PRECISIONS, Plain)):
        monkeypatch.setitem(table, kind.__name__, kind)
    recipe = Recipe(Backwards(), OwnBlock(), Doubled(), Plain())
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    q, k = inputs(LAYOUT)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(9))
    engine = Engine(recipe, ["layer"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, StepContext(), lambda: pytest.fail("ran dense"))
    block = (LAYOUT.seq_len - 1 - torch.arange(LAYOUT.seq_len)) // 32
    expected = 2 * masked_attention(q, k, v, (block[:, None] == block).expand(2, 3, -1, -1))
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    # What a calibration asks: the blocks that half the calls kept.
    select, blocks = recipe.select, SequenceBlocks(LAYOUT, None, 32, 32, CPU)
    kept = select.scores(blocks, None, call_of(q, k))
    assert kept.equal(torch.eye(blocks.num_blocks[0])[None, None])
    assert select.chosen_by(blocks, kept * 0.5).equal(kept.bool())
    assert not select.chosen_by(blocks, kept * 0.49).any()


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({"compensate": PooledResidual()}, "a dense selection leaves none out"),
        ({"compensate": PooledResidual(), "select": Circle()}, "Circle also hides single tokens"),
        ({"precision": Int8()}, "use select 'full'"),
        ({"select": Circle(), "schedule": Schedule(density_points=((0.5, 0.2),))}, "a density, got Circle"),
        (
            {"select": Pooled(head_densities=((0.2,),)), "schedule": Schedule(density_points=((0.5, 0.2),))},
            "both set the density",
        ),
    ],
)
def test_stages_say_what_they_do_not_go_with(stages, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**stages)


def test_stages_go_with_what_they_do_not_refuse():
    Recipe(compensate=PooledResidual(), select=FullSelect())
    Recipe(precision=Int8(), select=FullSelect())
    Recipe(select=FrozenMass(), schedule=Schedule(density_points=((0.5, 0.2),)))
