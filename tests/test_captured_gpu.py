"""Sparse calls in CUDA graphs: what a replay computes, what it waits for, and what is counted."""

import gc

import pytest
import torch

from benchmarks.captured_calls import captured
from dit_accel import patch, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.patches.placement import is_of_graph
from dit_accel.run import Run
from tests.calls import attend

pytestmark = pytest.mark.gpu

LAYOUT = TokenLayout((1, 32, 48), 256, 1792)
RECIPES = {
    "a plan for all steps": ("pooled", {"refresh_every": 1_000_000}, {}),
    "a plan a step": ("pooled", {}, {}),
    "mass a step": ("mass", {}, {"schedule": "schedule"}),
    "static": ("window", {}, {}),
    "int8": ("pooled", {"refresh_every": 1_000_000}, {"precision": "int8"}),
    "64-query blocks": ("pooled", {"refresh_every": 1_000_000}, {"select.block": (64, 64)}),
}


def draw(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(1, LAYOUT.seq_len, 4, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(3)
    ]


@pytest.mark.parametrize("hidden", [False, True], ids=["", "key mask"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_replay_equals_the_call_outside_a_graph(name, hidden):
    preset, options, changes = RECIPES[name]
    engine = Engine(presets.resolve(preset, **options).with_fields(changes), ["layer"], "auto", 0)
    shown = (torch.arange(LAYOUT.seq_len, device="cuda") > 200).expand(1, 1, 1, -1) if hidden else None
    q, k, v = draw(0)
    forwards = iter(range(1, 100))

    def call():
        inputs = AttentionInputs(q, k, v, shown)
        return attend(engine, 0, inputs, LAYOUT, StepContext(forward_id=next(forwards)), lambda: q)

    with torch.no_grad():
        graph = captured(call, warm_ups=3)
        for seed in (1, 2):
            for mine, new in zip((q, k, v), draw(seed), strict=True):
                mine.copy_(new)
            graph.output.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            replayed = graph.output.clone()
            # The same plan, or one made for the same tensors.
            assert torch.equal(replayed, call())
    counted = engine.records[0]
    # The capture itself is counted nowhere, and nothing that a graph owns was kept.
    assert counted.sparse_calls == 3 + 2
    assert int(counted.nan_calls) == 0
    assert 0 < counted.density_sum / counted.sparse_calls < 1
    assert engine.sparse_time.seconds() > 0


def test_a_captured_call_allocates_nothing_outside_its_graph():
    engine = Engine(presets.pooled(refresh_every=1_000_000), ["layer"], "auto", 0)
    q, k, v = draw(0)
    forwards = iter(range(4))

    def call():
        step = StepContext(forward_id=next(forwards))
        return attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda: q)

    with torch.no_grad():
        graph = captured(call, warm_ups=3)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_key_mask_that_was_not_seen_is_refused_in_a_sentence():
    engine = Engine(presets.pooled(refresh_every=1_000_000), ["layer"], "auto", 0)
    q, k, v = draw(0)
    forwards = iter(range(1, 100))

    def call(mask):
        inputs = AttentionInputs(q, k, v, mask)
        return attend(engine, 0, inputs, LAYOUT, StepContext(forward_id=next(forwards)), lambda: q)

    masks = [(torch.arange(LAYOUT.seq_len, device="cuda") > bound).expand(1, 1, 1, -1) for bound in (100, 200)]
    with torch.no_grad():
        call(masks[0])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(RuntimeError, match="a key mask must be the tensor that an earlier call had")
        with refused, torch.cuda.graph(graph):
            call(masks[1])
    torch.cuda.synchronize()


@pytest.mark.parametrize("preset", ["pooled", "window"])
def test_reduce_overhead_runs_the_steps_of_a_recipe(preset):
    """Decisions of a step are outside the graphs: what is captured in one step must not be replayed in another."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 16, "ffn_dim": 64, "num_layers": 2}
    model = WanTransformer3DModel(**settings).to("cuda", torch.bfloat16).eval()
    text, time = torch.randn(1, 8, 16, device="cuda", dtype=torch.bfloat16), torch.ones(1, device="cuda")
    inputs = [torch.randn(1, 16, 3, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]

    def forwards(run):
        with torch.no_grad(), patch(model, preset) as handle:
            # Copies: the next replay writes over the memory of a graph.
            found = [run(x, time, text, return_dict=False)[0].clone() for x in inputs for _ in range(2)]
            summary = handle.summary()
        return found, summary

    expected, before = forwards(model)
    torch.compiler.reset()
    got, after = forwards(torch.compile(model, mode="reduce-overhead"))
    assert after.sparse_calls == before.sparse_calls > 0
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()


@pytest.mark.parametrize("options", [{"refresh_every": 1_000_000}, {}], ids=["kept plans", "a plan a step"])
def test_a_patched_transformers_forward_is_captured(options):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 64, "text_dim": 16, "ffn_dim": 64, "num_layers": 2}
    model = WanTransformer3DModel(**settings).to("cuda", torch.bfloat16).eval()
    text, time = torch.randn(1, 8, 16, device="cuda", dtype=torch.bfloat16), torch.ones(1, device="cuda")
    x = torch.randn(1, 16, 3, 64, 64, device="cuda", dtype=torch.bfloat16)

    def forward():
        return model(x, time, text, return_dict=False)[0]

    with torch.no_grad(), patch(model, presets.pooled(dense_fraction=0.0, **options)) as handle:
        graph = captured(forward, warm_ups=3)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        replayed = graph.output.clone()
        assert torch.equal(replayed, forward())
        assert handle.summary().sparse_calls == 2 * (3 + 1)


@pytest.mark.parametrize("block", [(128, 128), (64, 64)], ids=["", "64-query blocks"])
def test_a_capture_in_which_a_plan_is_due_leaves_the_older_one(block):
    """The next call outside the graph plans for itself, as if there had been no capture."""
    recipe = presets.pooled(refresh_every=3).with_fields({"select.block": block})
    engines = [Engine(recipe, ["layer"], "auto", 0) for _ in range(2)]
    forwards = [iter(range(1, 100)) for _ in engines]

    def call(which, tensors):
        step = StepContext(forward_id=next(forwards[which]))
        return attend(engines[which], 0, AttentionInputs(*tensors), LAYOUT, step, lambda: tensors[0])

    with torch.no_grad():
        mine = draw(0)
        graph = captured(lambda: call(0, mine), warm_ups=3)
        for _ in range(3):
            call(1, mine)
        new = draw(1)
        for tensor, other in zip(mine, new, strict=True):
            tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        replayed = graph.output.clone()
        assert torch.equal(call(0, new), call(1, new))
        assert torch.equal(replayed, call(1, new))  # a plan of the replay's own queries and keys


def test_a_graph_outlives_the_run_of_its_plan():
    engine = Engine(presets.pooled(refresh_every=1_000_000), ["layer"], "auto", 0)
    q, k, v = draw(0)
    forwards = iter(range(1, 100))

    def call():
        step = StepContext(forward_id=next(forwards))
        return attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, step, lambda: q)

    with torch.no_grad():
        graph = captured(call, warm_ups=2)
        graph.replay()
        torch.cuda.synchronize()
        expected = graph.output.clone()
        engine.run = Run()
        engine.planner.tables.clear()
        gc.collect()
        # What was freed is now others'.
        filled = [torch.full((size,), -1, dtype=torch.int32, device="cuda") for size in 256 * [512] + 64 * [1 << 16]]
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(graph.output, expected)
        assert all(bool((one == -1).all()) for one in filled)


def _positions(width, tokens=384):
    """(image, row, column) of tokens in rows of ``width``, a 0-d tensor; float32 ``[tokens, 3]``."""
    place = torch.arange(tokens, device=width.device)
    return torch.stack([torch.zeros_like(place), place // width, place % width], -1).float()


def _flux():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"in_channels": 16, "num_attention_heads": 2, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    text = {"joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": False}
    model = FluxTransformer2DModel(**sizes, **text, num_layers=1, num_single_layers=1).to("cuda", torch.bfloat16).eval()
    drawn = torch.Generator("cuda").manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=drawn)

    given = {"hidden_states": draw(1, 384, 16), "encoder_hidden_states": draw(1, 16, 16), "return_dict": False}
    given |= {"pooled_projections": draw(1, 16), "timestep": torch.ones(1, device="cuda", dtype=torch.bfloat16)}
    return model, given | {"txt_ids": torch.zeros(16, 3, device="cuda")}


def test_positions_that_a_graph_computes_are_read_anew():
    """A replay writes another grid to the same address, and no version tells."""
    model, given = _flux()
    width = torch.tensor(24, device="cuda")
    with torch.no_grad():
        graph = captured(lambda: _positions(width), warm_ups=1)
        assert is_of_graph(graph.output)
        assert not is_of_graph(given["hidden_states"])
        with patch(model, "window", window=(1, 3, 3)):
            for size in (24, 16, 24, 32):
                width.fill_(size)
                graph.replay()
                got = model(**given, img_ids=graph.output)[0]
                assert torch.equal(got, model(**given, img_ids=graph.output.clone())[0])


def test_reduce_overhead_knows_the_grid_of_each_forward():
    """Inside one graph of the whole transformer, positions come in memory of the graph's own."""
    model, given = _flux()
    sizes, grids = (24, 16, 24, 32), []
    ids = [_positions(torch.tensor(size, device="cuda")) for size in sizes]
    run = torch.compile(model, mode="reduce-overhead")
    with (
        torch.no_grad(),
        patch(model, "window") as handle,
        handle.observe(lambda _, call: grids.append(call.layout.grid)),
    ):
        for one in ids:
            for _ in range(3):
                run(**given, img_ids=one)
    assert grids == [(1, 384 // size, size) for size in sizes for _ in range(3 * 2)]
