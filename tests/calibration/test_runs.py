"""What a calibration needs is asked for before its runs; an interrupted one goes on as the very same or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel import Recipe, calibrate, patch
from dit_accel.calibration.identity import describe, first_difference
from dit_accel.calibration.search import search
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select_dynamic import Pooled
from dit_accel.stages.select_mass import Mass
from tests.patches.test_fingerprint import with_lora
from tests.tiny import TINY
from tests.training.test_adapter_storage import stored

RECIPE = Recipe(select=Mass(density=0.4, block=(32, 32), head_adaptive=False))
KWARGS: dict[str, Any] = {"height": 96, "width": 112, "num_frames": 9, "num_inference_steps": 3, "guidance_scale": 5.0}


def prompts(scale: float = 1.0, count: int = 2) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return [{name: scale * torch.randn(1, 16, 32, generator=generator) for name in names} for _ in range(count)]


def pipeline() -> Any:
    pipe = TINY["wan"].build(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, path: Any, **changes: Any) -> torch.Tensor:
    """The bits of a calibration."""
    options = {"generate_kwargs": KWARGS, "buckets": 2, "prompts": prompts(), "recipe": RECIPE, **changes}
    return (
        calibrate(pipe, options.pop("prompts"), options.pop("recipe"), out=path, **options)
        .transformers["transformer"]
        .masks.bits
    )


def interrupt(path: Any, pipe: Any = None, at: int = 4, **changes: Any) -> None:
    def stop(state: Any) -> None:
        if state.done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe or pipeline(), path, progress=stop, **changes)
    assert path.with_name(path.name + ".partial").exists()


@pytest.mark.parametrize("form", ["sequential offload", "groups of leaves", "groups on disk", "fused projections"])
def test_an_offloaded_pipeline_is_calibrated_like_another(form, tmp_path):
    pipe = stored(pipeline(), form, tmp_path)
    bits = run(pipe, tmp_path / "offloaded")
    assert torch.equal(bits, run(pipeline(), tmp_path / "plain"))
    for name in ("offloaded", "plain"):
        for user in (pipe, pipeline()):
            with patch(user, RECIPE, calibration=tmp_path / name) as handle:
                user(**KWARGS, **prompts()[0], output_type="latent")
            assert handle.summary().sparse_calls > 0


def test_plans_of_one_storage_serve_another(tmp_path):
    run(stored(pipeline(), "e4m3"), tmp_path / "file")
    for form in ("plain", "bf16", "e5m2", "sequential offload"):
        patch(stored(pipeline(), form), RECIPE, calibration=tmp_path / "file").remove()
    other = pipeline()
    for parameter in other.transformer.parameters():
        parameter.data *= 1.5
    with pytest.raises(ValueError, match="does not fit: it is for other weights"):
        patch(stored(other, "e4m3"), RECIPE, calibration=tmp_path / "file")


# Refusals before the first run.


def _meta(pipe: Any) -> None:
    pipe.transformer.to("meta")


def _patched(pipe: Any) -> None:
    pipe.handle = patch(pipe, "dense")


GENERATOR = {"generator": torch.Generator()}
PER_HEAD = Recipe(select=Mass(density=0.5, block=(32, 32), head_densities=((0.3, 0.9, 0.5),)))
PER_LAYER = Recipe(select=Mass(density=0.5, block=(32, 32), head_densities=((0.3,), (0.9,))))
REFUSED: dict[str, tuple[Callable[[Any], None] | None, dict[str, Any], str]] = {
    "meta": (_meta, {}, "WanTransformer3DModel cannot be read: they are on the meta device"),
    "patched": (_patched, {}, r"WanPipeline is patched; call unpatch\(pipe\)"),
    "no prompts": (None, {"prompts": []}, "non-empty sequence"),
    "one prompt": (None, {"prompts": "a cat"}, "non-empty sequence"),
    "arguments alone": (None, {"prompts": prompts()[0]}, "non-empty sequence"),
    "odd prompt": (None, {"prompts": [3]}, "must be text or a mapping of arguments, got int"),
    "seeds": (None, {"seeds": (1,)}, "as many as prompts, 2, got 1"),
    "seeds and a generator": (None, {"seeds": (1, 2), "generate_kwargs": {**KWARGS, **GENERATOR}}, "exclude each"),
    "no buckets": (None, {"buckets": 0}, "buckets must be at least 1, got 0"),
    "no axis prompts": (None, {"axis_prompts": 0}, "axis_prompts must be at least 1, got 0"),
    "unknown argument": (None, {"generate_kwargs": {"frames": 9}}, "WanPipeline takes no frames, got 9"),
    "unknown in the second": (
        None,
        {"prompts": [prompts()[0], {**prompts()[1], "guidence": 3}]},
        "WanPipeline takes no guidence, got 3",
    ),
    "sizes": (
        None,
        {"prompts": [prompts()[0], {**prompts()[1], "height": 64}]},
        "must share one height, got (96, 64|64, 96)",
    ),
    "heads": (None, {"recipe": PER_HEAD}, "are for 3 heads, the layer has 2"),
    "layers": (None, {"recipe": PER_LAYER, "layers": 3}, "names 2 layers, the model has a layer 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_is_said_before_the_first_run(name, tmp_path, monkeypatch):
    spoil, changes, words = REFUSED[name]
    changes = dict(changes)
    pipe = TINY["wan"].build(changes.pop("layers", 1))
    if spoil is not None:
        spoil(pipe)
    monkeypatch.setattr(type(pipe), "encode_prompt", _must_not_run)
    with pytest.raises(ValueError, match=words):
        run(pipe, tmp_path / "file", **changes)
    assert not list(tmp_path.iterdir())


def _must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a run began")


@pytest.mark.parametrize("where", ["folder", "file/inside", "partial"])
def test_a_file_that_cannot_be_written_is_refused_before_the_first_run(where, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "partial.partial").mkdir()
    pipe = pipeline()
    monkeypatch.setattr(type(pipe), "encode_prompt", _must_not_run)
    with pytest.raises(ValueError, match=r"is a folder; give the name of a file|Cannot write in"):
        run(pipe, tmp_path / where)


def test_a_transformer_that_is_never_sparse_is_told_after_the_first_run(tmp_path):
    """Of two experts the first has the high noise, which this recipe leaves dense."""
    pipe = TINY["wan2.2"].build(1)
    pipe.set_progress_bar_config(disable=True)
    recipe = Recipe(select=RECIPE.select, schedule=Schedule(dense_fraction=0.8))
    seen: list[Any] = []
    kwargs = {**KWARGS, "num_inference_steps": 6}
    with pytest.raises(ValueError, match="transformer ran no sparse step: nothing can be calibrated for it"):
        run(pipe, tmp_path / "file", recipe=recipe, progress=seen.append, generate_kwargs=kwargs)
    assert [state.done for state in seen] == list(range(1, 7))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_end_leaves_what_was_done(tmp_path, monkeypatch):
    from dit_accel import tensor_files

    save, path = tensor_files.save_file, tmp_path / "file"

    def full(tensors: Any, draft: Any, **options: Any) -> None:
        if "partial" not in draft.name:
            raise OSError(28, "No space left on device")
        save(tensors, draft, **options)

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(ValueError, match=r"Cannot write .*file: No space left on device"):
        run(pipeline(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.partial"]
    monkeypatch.undo()
    pipe = pipeline()
    monkeypatch.setattr(type(pipe), "encode_prompt", _must_not_run)
    run(pipe, path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# Resuming.


def _tuned(pipe: Any) -> None:
    for parameter in pipe.transformer.parameters():
        parameter.data *= 1.001


def _with_vae(pipe: Any) -> None:
    for parameter in pipe.vae.parameters():
        parameter.data *= 1.5


def _shifted(pipe: Any) -> None:
    pipe.scheduler.set_shift(5.0)


def _scheduler(pipe: Any) -> None:
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def _configured(pipe: Any) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False, shift_terminal=0.1)


def _lora(pipe: Any) -> None:
    with_lora(pipe.transformer)


def _fused_lora(pipe: Any) -> None:
    with_lora(pipe.transformer).fuse_lora(lora_scale=0.5)


def _half(pipe: Any) -> None:
    pipe.transformer.to(torch.bfloat16)


def _eight_bits(pipe: Any) -> None:
    stored(pipe, "e4m3")


def _config(pipe: Any) -> None:
    pipe.register_to_config(expand_timesteps=True)


OTHERS: dict[str, tuple[Callable[[Any], None] | None, dict[str, Any], str]] = {
    "tuned weights": (_tuned, {}, r"its pipeline\.transformer\.weights is '\w+', asked for is '\w+'"),
    "dtype": (_half, {}, r"its pipeline\.transformer\.dtypes"),
    "eight bits": (_eight_bits, {}, r"its pipeline\.transformer\.dtypes"),
    "LoRA": (_lora, {}, r"its pipeline\.transformer\.loras is \[\], asked for is \['mine 1\.5'\]"),
    "fused LoRA": (_fused_lora, {}, r"asked for is \['mine 0\.75 fused'\]"),
    "VAE": (_with_vae, {}, r"its pipeline\.vae\.weights"),
    "scheduler": (_scheduler, {}, r"its pipeline\.scheduler\."),
    "scheduler's settings": (_configured, {}, r"its pipeline\.scheduler\.shift_terminal is None, asked for is 0\.1"),
    "scheduler's shift": (_shifted, {}, r"its pipeline\.scheduler\.shift is 3\.0, asked for is 5\.0"),
    "pipeline's settings": (_config, {}, r"its pipeline\.settings\.expand_timesteps is False, asked for is True"),
    "embeddings": (
        None,
        {"prompts": prompts(3.0)},
        r"its prompts\.0\.negative_prompt_embeds is 'float32 \(1, 16, 32\)",
    ),
    "second embeddings": (
        None,
        {"prompts": [prompts()[0], prompts(3.0)[1]]},
        r"its prompts\.1\.negative_prompt_embeds is 'float32",
    ),
    "negative": (
        None,
        {"prompts": [{**one, "negative_prompt_embeds": torch.ones(1, 16, 32)} for one in prompts()]},
        r"its prompts\.0\.negative_prompt_embeds",
    ),
    "fewer prompts": (None, {"prompts": prompts(count=1)}, "its prompts is"),
    "text": (
        None,
        {"prompts": [{**one, "max_sequence_length": 9} for one in prompts()]},
        "max_sequence_length is None",
    ),
    "guidance": (
        None,
        {"generate_kwargs": {**KWARGS, "guidance_scale": 4.0}},
        r"guidance_scale is 5\.0, asked for is 4",
    ),
    "steps": (
        None,
        {"generate_kwargs": {**KWARGS, "num_inference_steps": 4}},
        "num_inference_steps is 3, asked for is 4",
    ),
    "size": (None, {"generate_kwargs": {**KWARGS, "height": 112}}, "height is 96, asked for is 112"),
    "seeds": (None, {"seeds": (0, 7)}, r"its seeds\.1 is 1, asked for is 7"),
    "buckets": (None, {"buckets": 3}, "its buckets is 2, asked for is 3"),
    "recipe": (
        None,
        {"recipe": RECIPE.with_fields({"select.density": 0.5})},
        r"recipe\.select\.density is 0\.4, asked",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("interrupted") / "file"
    interrupt(path)
    return path.with_name("file.partial").read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_another_calibration_is_not_gone_on_with(name, interrupted, tmp_path, monkeypatch):
    change, changes, words = OTHERS[name]
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    partial.write_bytes(interrupted)
    pipe = pipeline()
    if change is not None:
        change(pipe)
    monkeypatch.setattr(type(pipe), "encode_prompt", _must_not_run)
    with pytest.raises(ValueError, match=rf"is the beginning of another calibration: .*{words}.*resume=False\."):
        run(pipe, path, **changes)
    assert partial.read_bytes() == interrupted


def test_where_the_user_asks_another_one_begins_anew(interrupted, tmp_path):
    (tmp_path / "file.partial").write_bytes(interrupted)
    changes = {"prompts": prompts(3.0)}
    anew = run(pipeline(), tmp_path / "file", resume=False, **changes)
    assert torch.equal(anew, run(pipeline(), tmp_path / "fresh", **changes))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "fresh"]


@pytest.mark.parametrize("form", ["plain", "sequential offload", "groups of blocks"])
def test_the_very_same_is_gone_on_with_wherever_its_weights_are(form, interrupted, tmp_path):
    (tmp_path / "file.partial").write_bytes(interrupted)
    seen: list[Any] = []
    bits = run(stored(pipeline(), form), tmp_path / "file", progress=seen.append)
    assert [state.done for state in seen] == [4, 5, 6]
    assert torch.equal(bits, run(pipeline(), tmp_path / "fresh"))


def test_a_generator_begins_every_run_where_the_user_left_it(tmp_path):
    def with_generators() -> list[dict[str, Any]]:
        return [{**one, "generator": torch.Generator().manual_seed(5 + n)} for n, one in enumerate(prompts())]

    given = with_generators()
    whole = run(pipeline(), tmp_path / "whole", prompts=given)
    assert all(
        torch.equal(a["generator"].get_state(), b["generator"].get_state()) for a, b in zip(given, with_generators())
    )
    interrupt(tmp_path / "file", prompts=with_generators())
    assert torch.equal(run(pipeline(), tmp_path / "file", prompts=with_generators()), whole)
    interrupt(tmp_path / "other", prompts=with_generators())
    later = with_generators()
    torch.randn(3, generator=later[1]["generator"])
    with pytest.raises(ValueError, match=r"its prompts\.1\.generator is 'generator "):
        run(pipeline(), tmp_path / "other", prompts=later)


def _half_of_it(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", ["half", "empty", "text", "no header", "list", "other header", "no counts"])
def test_a_damaged_beginning_is_named(damage, interrupted, tmp_path):
    path, partial = tmp_path / "file", tmp_path / "file.partial"
    partial.write_bytes(interrupted)
    with safe_open(partial, "pt") as file:
        header = json.loads(file.metadata()["dit_accel"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header.pop("counts")
    if damage in ("half", "empty", "text"):
        partial.write_bytes({"half": _half_of_it(interrupted), "empty": b"", "text": b"{}"}[damage])
    else:
        texts = {"no header": None, "list": "[1]", "other header": '{"format": 1}', "no counts": json.dumps(header)}
        text = texts[damage]
        save_file(tensors, partial, metadata=None if text is None else {"dit_accel": text})
    before = partial.read_bytes()
    with pytest.raises(ValueError, match=r"is a damaged beginning of a calibration: .*resume=False\.") as caught:
        run(pipeline(), path)
    assert "\n" not in str(caught.value)
    assert partial.read_bytes() == before


def test_a_callback_of_the_user_is_called_too(tmp_path):
    seen: list[int] = []

    def watch(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return state

    told: list[Any] = []
    kwargs = {**KWARGS, "callback_on_step_end": watch}
    run(pipeline(), tmp_path / "file", generate_kwargs=kwargs, progress=told.append)
    assert seen == [0, 1, 2, 0, 1, 2]
    assert len(told) == 6


def test_arguments_are_described_by_what_is_in_them():
    for same in (
        lambda: torch.arange(5).bfloat16(),
        lambda: torch.tensor(2.0),
        lambda: torch.ones(2, dtype=torch.float8_e4m3fn),
        lambda: np.arange(4.0),
        lambda: Image.new("RGB", (4, 2), "red"),
        lambda: torch.Generator().manual_seed(3),
        lambda: {"a": [1, 2.5, None, True, "x"], "b": (float("nan"),)},
        lambda: {"b", "a"},
        lambda: describe,
    ):
        assert first_difference(describe(same()), json.loads(json.dumps(describe(same())))) is None
    for one, other in (
        (torch.ones(2), torch.ones(2).half()),
        (torch.ones(2, 1), torch.ones(1, 2)),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2e-7])),
        (np.ones(2), np.zeros(2)),
        (Image.new("RGB", (4, 2), "red"), Image.new("RGB", (4, 2), "blue")),
        (torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)),
        ({"a": 1}, {"a": 1, "b": None}),
        (describe, first_difference),
    ):
        if not isinstance(one, dict):
            assert first_difference(describe(one), describe(other), "x") is not None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "its a.1.b is 2, asked for is 3"


# Search.


def test_a_density_that_cannot_be_is_told_before_heads_are_measured():
    told: list[Any] = []
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    with pytest.raises(ValueError, match=r"mean_density must lie in \[0\.\d+, 1\], got 0\.1"):
        search(pipeline(), prompts(count=1), recipe, mean_density=0.1, generate_kwargs=KWARGS, progress=told.append)
    # The one dense run, and a forward for each of its three steps; not one for each head.
    assert [state.stage for state in told] == ["dense runs"] + 3 * ["heads"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "non-empty"),
        ({"generate_kwargs": {"frames": 3}}, "takes no frames"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"densities": (0.3, 1.5)}, r"density must lie in \(0, 1\], got 1.5"),
        ({"orders": ("fhw", "xyz")}, "xyz"),
        ({"mean_density": 1.5}, r"mean_density must lie in \(0, 1\], got 1.5"),
    ],
)
def test_a_search_says_what_would_fail_before_its_runs(changes, words, monkeypatch):
    pipe = pipeline()
    monkeypatch.setattr(type(pipe), "encode_prompt", _must_not_run)
    options = {"prompts": prompts(), "generate_kwargs": KWARGS, "mean_density": 0.5, **changes}
    with pytest.raises(ValueError, match=words):
        search(pipe, options.pop("prompts"), Recipe(select=Pooled(block=(32, 32))), **options)


def test_a_patched_pipeline_is_not_searched():
    pipe = pipeline()
    with patch(pipe, "dense"), pytest.raises(ValueError, match="WanPipeline is patched"):
        search(pipe, prompts(), Recipe(select=Pooled(block=(32, 32))), mean_density=0.5, generate_kwargs=KWARGS)


def test_a_search_finds_the_same_where_weights_are_offloaded():
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    options = {"mean_density": 0.7, "samples": 1, "densities": (0.3, 0.6), "generate_kwargs": KWARGS}
    found = [
        search(stored(pipeline(), form), prompts(count=1), recipe, **options).recipe
        for form in ("plain", "sequential offload")
    ]
    assert found[0] == found[1]
