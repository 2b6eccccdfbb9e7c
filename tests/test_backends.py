"""A named backend is honoured or refused by every operation, and the record is what ran."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import BACKENDS
from dit_accel.kernels.attention import tuning
from dit_accel.kernels.common import capability
from dit_accel.kernels.common.choice import Case
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.compensate.clipped import ClippedSoftmax
from dit_accel.stages.compensate.pyramid import KeyPyramid
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.compensate.routed_heads import RoutedHeads
from dit_accel.stages.precision import Int8, Int8Fp8
from dit_accel.stages.select.pooled import Pooled
from tests.calls import attend
from tests.tiny import TINY

LAYOUT = TokenLayout((2, 4, 16), 0, 128)
CUDA = torch.device("cuda", 0)
LAYERS = ["first", "second", "third"]  # some recipes leave the first ones dense
SOME = (0, 1, 2, 6, 9)

# Which operation a kernel's file belongs to.
# Modules of kernels that are launched, below dit_accel.kernels.
KERNELS = {
    "attention.triton.forward": "attention",
    "attention.triton.reorder": "attention",
    "attention.hopper.kernel": "hopper",
    "mask.triton_lists": "selection",
    "selection.triton.pooling": "selection",
    "selection.triton.topk": "selection",
    "selection.triton.spread": "selection",
    "selection.triton.block_mass": "block_mass",
    "selection.triton.gate": "gate",
    "selection.triton.gate_steps": "gate",
    "selection.triton.rectified": "rectified",
    "pyramid.triton.forward": "pyramid",
    "pyramid.triton.means": "residual",
    "linear.triton.forward_kernels": "linear_branch",
    "quantized.triton.prologue_kernels": "quantized_attention",
    "quantized.triton.forward": "quantized_attention",
}


def recipe_of(name: str) -> Recipe:
    """A preset that plans without a calibration."""
    recipe = presets.resolve(name)
    return recipe.with_fields({"order": "raster"}) if name == "paro" else recipe


RECIPES = {name: recipe_of(name) for name in presets.PRESETS if name != "dense"}
RECIPES |= {
    "residual": Recipe(select=Pooled(), compensate=PooledResidual()),
    "carried over means": presets.carried(means=True, query_stride=1),
    "clipped": Recipe(select=Pooled(), compensate=ClippedSoftmax()),
    "routed heads": Recipe(select=Pooled(), compensate=RoutedHeads()),
    "mass and a pyramid": presets.mass().with_fields({"compensate": "key_pyramid"}),
    "negligible blocks": presets.sla().with_fields({"compensate.form": "paper"}),
    "hedgehog": presets.sla().with_fields({"compensate.feature_map": "hedgehog"}),
}


def inputs(device: torch.device, dtype: torch.dtype, layout: TokenLayout = LAYOUT, dim: int = 16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, layout.seq_len, 2, dim, generator=generator).to(device, dtype) for _ in range(3)]


def run(engine: Engine, device: torch.device, dtype: torch.dtype, steps=range(10), layout=LAYOUT) -> None:
    """Steps of the last layer; each dense call is the value itself."""
    q, k, v = inputs(device, dtype, layout, 16 if device.type == "cpu" else 64)
    recipe, given = engine.recipe, None
    if recipe.compensate.reads_input:
        given = [torch.ones_like(q)]
    elif recipe.compensate.is_learned:
        engine.learned[2] = recipe.compensate.build(2, q.shape[-1]).to(device)
    if recipe.select.is_learned:
        engine.routers[2] = recipe.select.build(2, q.shape[-1]).to(device)
    with torch.no_grad():
        for index in steps:
            step = StepContext(index=index, num_steps=10, sigma=1 - index / 10, forward_id=index)
            attend(engine, 2, AttentionInputs(q, k, v), layout, step, lambda: v, given)


@pytest.fixture
def pretended(monkeypatch) -> Callable[..., None]:
    """A GPU of a compute capability, as far as choices look at it."""

    def gpu(*capability_of_gpu: int) -> None:
        monkeypatch.setattr(capability, "compute_capability", lambda index: capability_of_gpu)
        monkeypatch.setattr(capability, "_FA4_INSTALLED", True)
        monkeypatch.setattr(tuning, "fa4_is_fastest", lambda case: False)

    gpu(9, 0)
    return gpu


def launched_by_triton(_self, kernel, grid, _key, args, constants, num_warps) -> None:
    kernel[grid](*args, **constants, num_warps=num_warps)


@pytest.fixture
def launched(monkeypatch) -> set[str]:
    """Operations whose Triton kernels run."""
    from triton.runtime import interpreter, jit

    from dit_accel.kernels.common.compiled import CompiledVariants, KeptKernel

    # Launches of variants that are kept from tests before pass Triton by.
    monkeypatch.setattr(KeptKernel, "_launch", lambda self, grid, *args, **named: self.kernel[grid](*args, **named))
    monkeypatch.setattr(CompiledVariants, "launch", launched_by_triton)
    found: set[str] = set()
    for function in (interpreter.InterpretedFunction, jit.JITFunction):

        def spy(self, *args, true=function.run, **options):
            found.add(KERNELS[self.fn.__module__.removeprefix("dit_accel.kernels.")])
            return true(self, *args, **options)

        monkeypatch.setattr(function, "run", spy)
    return found


@pytest.fixture
def plain(monkeypatch) -> set[str]:
    """Which torch implementations of attention run."""
    from dit_accel.kernels.attention import gather, reference
    from dit_accel.kernels.pyramid import api as pyramid
    from dit_accel.kernels.quantized import api as quantized
    from dit_accel.kernels.quantized import integer_weights

    found: set[str] = set()
    for module, name, kind in (
        (gather, "gather_attention", "torch"),
        (reference, "reference_attention", "reference"),
        (pyramid, "_pyramid_attention_torch", "pyramid"),
        (quantized, "_emulate", "emulated"),
        (integer_weights, "integer_weight_attention", "emulated"),
    ):
        monkeypatch.setattr(module, name, _spied(getattr(module, name), kind, found))
    return found


def _spied(true, kind: str, found: set[str]):
    def spy(*args, **options):
        found.add(kind)
        return true(*args, **options)

    return spy


@pytest.fixture
def compiled_only(monkeypatch) -> None:
    """As for a user without a GPU: Triton is not interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_named_backend_runs_every_operation(name, backend, launched, plain, compiled_only):
    engine = Engine(RECIPES[name], LAYERS, backend, 0)
    run(engine, torch.device("cpu"), torch.float32, SOME)
    used = engine.backends_used.to_dict()
    assert set(used) == set(engine.planner.choices(Case(torch.device("cpu")), backend))
    assert all(list(names) == [backend] for names in used.values()), used
    assert all("asked for by name" in reason for names in used.values() for reason in names.values())
    assert not launched
    attended = {"attention", "quantized_attention"} & set(used)
    assert (backend in plain) == bool(attended)
    assert ({"torch", "reference"} - {backend}).isdisjoint(plain)
    assert ("pyramid" in plain) == ("pyramid" in used)
    assert ("emulated" in plain) == ("quantized_attention" in used)
    assert ("agents" in used) == (name == "agent")


@pytest.mark.parametrize("backend", ["triton", "fa4"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_cannot_be_honoured_is_refused_before_anything_ran(name, backend, launched, compiled_only):
    engine = Engine(RECIPES[name], LAYERS, backend, 0)
    for attempt in (
        lambda: run(engine, torch.device("cpu"), torch.float32),
        lambda: engine.refuse_backend(torch.device("cpu")),
        lambda: engine.refuse_backend(torch.device("cpu"), torch.float32),
    ):
        with pytest.raises(ValueError, match=rf"^Backend '{backend}' cannot run [a-z0-9 ]+ here: .+\.$"):
            attempt()
    assert engine.backends_used.to_dict() == {}
    assert not launched
    assert not engine.records[2].dense_calls
    assert not engine.records[2].plans_made


@pytest.mark.parametrize("name", RECIPES)
def test_an_automatic_choice_says_why_for_every_operation(name, launched):
    engine = Engine(RECIPES[name], LAYERS, "auto", 0)
    run(engine, torch.device("cpu"), torch.float32, SOME)
    used = engine.backends_used.to_dict()
    assert used
    assert all(list(names) == ["torch"] for names in used.values())
    assert all("triton: " in reason for names in used.values() for reason in names.values()), used
    assert not launched


OPERATIONS = {
    "pooled": {"attention"},
    "mass": {"attention", "search_attention", "block_mass"},
    "psa": {"pyramid", "block_mass"},
    "vmoba": {"attention", "gate"},
    "rectified": {"attention", "rectified"},
    "sla": {"attention", "linear_branch"},
    "routed heads": {"attention"},
    "residual": {"attention", "residual"},
    "carried over means": {"attention", "search_attention", "block_mass", "residual"},
    "sage": {"quantized_attention"},
    "sparge": {"attention"},
    "window": {"attention"},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_named_kernel_runs_every_operation(name, launched, plain):
    """Interpreted."""
    recipe = RECIPES[name].with_fields({"select.block": (64, 64) if name == "psa" else (32, 32)})
    engine = Engine(recipe, LAYERS, "triton", 0)
    run(engine, torch.device("cpu"), torch.float32, (1, 2, 6))
    used = engine.backends_used.to_dict()
    assert set(used) == OPERATIONS[name] | {"selection"}
    assert_launched(launched, used)
    assert not plain
    for operation in ("attention", "quantized_attention"):
        for reason in used.get(operation, {}).values():
            assert "portable kernel, not the Hopper one: it needs a GPU" in reason


def assert_launched(launched: set[str], used: dict[str, dict[str, str]]) -> None:
    """Every operation that is recorded ran in Triton, and no other did."""
    assert used
    assert all(list(names) == ["triton"] for names in used.values()), used
    # Dense attention, of a search or not, and, on Hopper, 8-bit attention run in attention's kernel.
    shared = {"attention", "search_attention", "dense_attention", "quantized_attention"}
    assert launched - shared - {"hopper"} == set(used) - shared
    assert bool(launched & {*shared, "hopper"}) == bool(shared & set(used))
    assert ("quantized_attention" in launched) == ("quantized_attention" in used)


@pytest.mark.parametrize(
    ("recipe", "backend", "operation", "reason"),
    [
        (RECIPES["psa"], "fa4", "attention", "KeyPyramid attends by itself"),
        (RECIPES["agent"], "fa4", "attention", "AgentTokens attends by itself"),
        (RECIPES["agent"], "triton", "agents", "no Triton kernel"),
        (RECIPES["clipped"], "triton", "clipped softmax", "no Triton kernel"),
        (RECIPES["hedgehog"], "triton", "linear branch", "hedgehog"),
        (RECIPES["sage"], "fa4", "quantized attention", "no 8-bit kernels"),
        (RECIPES["paro"].with_fields({"precision": "int8_int4"}), "triton", "quantized attention", "have no kernel"),
        (RECIPES["mass"], "fa4", "attention", "reads rows in order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gpu_refuses_what_it_cannot_run_either(recipe, backend, operation, reason, pretended):
    engine = Engine(recipe, LAYERS, backend, 0)
    with pytest.raises(ValueError, match=rf"Backend '{backend}' cannot run {operation} here: .*{reason}"):
        engine.refuse_backend(CUDA, torch.bfloat16)
    Engine(recipe, LAYERS, "auto", 0).refuse_backend(CUDA, torch.bfloat16)


@pytest.mark.parametrize("name", RECIPES)
def test_by_name_a_gpu_runs_torch_alone(name, pretended):
    for backend in ("torch", "reference"):
        choices = Engine(RECIPES[name], LAYERS, backend, 0).planner.choices(Case(CUDA, torch.bfloat16, 64), backend)
        assert {choice.name for choice in choices.values()} == {backend}


@pytest.mark.parametrize(
    ("recipe", "case", "operation", "reason"),
    [
        (RECIPES["sla"], Case(CUDA, torch.float32, 128), "linear_branch", "spill registers"),
        (RECIPES["sla"], Case(CUDA, torch.bfloat16, 160), "linear_branch", "head dim must be at most 128"),
        (RECIPES["hedgehog"], Case(CUDA, torch.bfloat16, 64), "linear_branch", "hedgehog"),
        (RECIPES["psa"], Case(CUDA, torch.float64, 64, recorded=True), "pyramid", "torch.float64"),
        (RECIPES["mass"], Case(CUDA, torch.float64, 64), "block_mass", "torch.float64"),
        (RECIPES["agent"], Case(CUDA, torch.bfloat16, 64), "agents", "no Triton kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_falling_back_to_torch_on_a_gpu_is_recorded(recipe, case, operation, reason, pretended):
    choice = Engine(recipe, LAYERS, "auto", 0).planner.choices(case, "auto")[operation]
    assert choice.name == "torch"
    assert reason in choice.reason
    assert Engine(recipe, LAYERS, "auto", 0).planner.choices(case, "auto")["selection"].name == "triton"


@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "training"])
def test_a_gpu_trains_psa_with_the_kernels(recorded, pretended):
    case = Case(CUDA, torch.bfloat16, 128, blocks=(128, 64), recorded=recorded)
    choices = Engine(RECIPES["psa"], LAYERS, "auto", 0).planner.choices(case, "auto")
    assert {choice.name for choice in choices.values()} == {"triton"}


def test_an_old_gpu_chooses_torch_and_refuses_what_it_has_no_numbers_for(pretended):
    pretended(8, 0)
    choices = Engine(RECIPES["sage"], LAYERS, "auto", 0).planner.choices(Case(CUDA, torch.float16, 64), "auto")
    assert choices["quantized_attention"].name == "triton"
    fp8 = Recipe(select=Pooled(), precision=Int8Fp8())
    with pytest.raises(ValueError, match=r"'int8_fp8' cannot run this call: FP8 needs compute capability 8\.9"):
        Engine(fp8, LAYERS, "auto", 0).refuse_backend(CUDA)
    pretended(7, 5)
    choices = Engine(RECIPES["mass"], LAYERS, "auto", 0).planner.choices(Case(CUDA, torch.float16, 64), "auto")
    assert {choice.name for choice in choices.values()} == {"torch"}
    assert all("8.0 or newer, got 7.5" in choice.reason for choice in choices.values())


def test_other_operations_than_attention_choose_by_themselves_under_fa4(pretended):
    recipe = Recipe(select=Pooled(block=(128, 128)))
    choices = Engine(recipe, LAYERS, "fa4", 0).planner.choices(Case(CUDA, torch.bfloat16, 64), "fa4")
    assert choices["attention"] == ("fa4", "asked for by name")
    assert choices["selection"].name == "triton"
    assert "fa4 is for attention alone" in choices["selection"].reason


def test_what_runs_nothing_refuses_nothing(compiled_only):
    cpu = torch.device("cpu")
    Engine(Recipe(), LAYERS, "triton", 0).refuse_backend(cpu)
    engine = Engine(RECIPES["psa"], LAYERS, "triton", 0)
    engine.switched_on = False
    engine.refuse_backend(cpu)
    engine.switched_on = True
    with pytest.raises(ValueError, match="'triton' cannot run selection here"):
        engine.refuse_backend(cpu, torch.int8)


def test_the_dtype_is_that_of_autocast(pretended, monkeypatch):
    engine = Engine(Recipe(select=Pooled(block=(128, 128))), LAYERS, "fa4", 0)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        engine.refuse_backend(CUDA, torch.float32)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    engine.refuse_backend(CUDA, torch.float32)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "auto"])
def test_a_pipeline_refuses_before_its_first_step_and_is_left_as_it_was(backend, compiled_only):
    tiny = TINY["wan"]
    pipe = tiny.build()
    before = tiny.run(pipe)
    with dit_accel.patch(pipe, "psa", backend=backend) as handle:
        if backend in ("torch", "reference"):
            tiny.run(pipe)
            assert {tuple(names) for names in handle.summary().backends.values()} == {(backend,)}
        else:
            with pytest.raises(ValueError, match=f"Backend '{backend}' cannot run"):
                tiny.run(pipe)
            assert not handle.summary().dense_calls
    assert torch.equal(tiny.run(pipe), before)


def test_the_summary_has_a_line_for_each_operation():
    tiny = TINY["wan"]
    pipe = tiny.build()
    recipe = Recipe(select=Pooled(density=0.4, block=(32, 32)), precision=Int8())
    with dit_accel.patch(pipe, recipe) as handle:
        tiny.run(pipe, steps=1)
        summary = handle.summary()
    found = json.loads(json.dumps(summary.to_dict()))["backends"]
    assert set(found) == {"selection", "quantized_attention"}
    assert "int8 emulated in float32" in found["quantized_attention"]["torch"]
    lines = str(summary).splitlines()
    assert any(line.startswith("  quantized attention: torch (int8 emulated") for line in lines)
    assert any(line.startswith("  selection: torch (triton: ") for line in lines)


def test_reasons_of_several_kinds_of_calls_are_all_kept():
    engine = Engine(Recipe(select=Pooled(block=(32, 32)), compensate=KeyPyramid()), LAYERS, "auto", 0)
    for dtype in (torch.float32, torch.float64):
        q, k, v = inputs(torch.device("cpu"), dtype)
        attend(engine, 0, AttentionInputs(q, k, v), LAYOUT, StepContext(), lambda v=v: v)
    (reason,) = engine.backends_used.to_dict()["pyramid"].values()
    assert "interpreter" in reason
    assert " / " in reason
    assert "torch.float64" in reason


GPU_LAYOUT = TokenLayout((4, 16, 32), 0, 2048)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", RECIPES)
def test_by_name_the_gpu_launches_no_kernel_of_ours(name, backend, launched):
    engine = Engine(RECIPES[name], LAYERS, backend, 0)
    run(engine, CUDA, torch.bfloat16, SOME, GPU_LAYOUT)
    used = engine.backends_used.to_dict()
    assert used
    assert all(list(names) == [backend] for names in used.values()), used
    assert not launched


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", [*OPERATIONS, "adaspa", "paro", "sparsed", "pbs", "sparge2", "ssa"])
def test_the_gpu_launches_what_is_recorded(name, backend, launched, plain):
    engine = Engine(RECIPES[name], LAYERS, backend, 0)
    run(engine, CUDA, torch.bfloat16, SOME, GPU_LAYOUT)
    used = engine.backends_used.to_dict()
    assert_launched(launched, used)
    assert not plain
