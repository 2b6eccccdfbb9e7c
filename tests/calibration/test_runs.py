"""What a calibration or a search needs is asked for before its runs, wherever the weights are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dit_accel import Recipe, calibrate, patch
from dit_accel.calibration.search import search
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.pooled import Pooled
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
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
    with pytest.raises(ValueError, match=words):
        run(pipe, tmp_path / "file", **changes)
    assert not list(tmp_path.iterdir())


def must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a run began")


@pytest.mark.parametrize("where", ["folder", "file/inside", "partial"])
def test_a_file_that_cannot_be_written_is_refused_before_the_first_run(where, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "partial.partial").mkdir()
    pipe = pipeline()
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
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
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
    run(pipe, path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# Search.


def test_a_density_that_cannot_be_is_told_before_the_runs():
    told: list[Any] = []
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    with pytest.raises(ValueError, match=r"mean_density must lie in \[0\.\d+, 1\], got 0\.1"):
        search(pipeline(), prompts(count=1), recipe, mean_density=0.1, generate_kwargs=KWARGS, progress=told.append)
    # A single forward tells what the heads keep at least; no run, and no head, is measured.
    assert [(state.stage, state.done) for state in told] == [("dense runs", 0)]


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
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
    options = {"prompts": prompts(), "generate_kwargs": KWARGS, "mean_density": 0.5, **changes}
    with pytest.raises(ValueError, match=words):
        search(pipe, options.pop("prompts"), Recipe(select=Pooled(block=(32, 32))), **options)


def test_a_patched_pipeline_is_not_searched():
    pipe = pipeline()
    with patch(pipe, "dense"), pytest.raises(ValueError, match="WanPipeline is patched"):
        search(pipe, prompts(), Recipe(select=Pooled(block=(32, 32))), mean_density=0.5, generate_kwargs=KWARGS)


def test_a_pipeline_in_parallel_is_not_searched():
    pipe = pipeline()
    pipe.transformer._parallel_config = object()
    with pytest.raises(ValueError, match="transformer shares its heads among processes"):
        search(pipe, prompts(), Recipe(select=Pooled(block=(32, 32))), mean_density=0.5, generate_kwargs=KWARGS)


def test_a_search_finds_the_same_where_weights_are_offloaded():
    recipe = Recipe(select=Pooled(density=0.3, block=(32, 32)))
    options = {"mean_density": 0.7, "samples": 1, "densities": (0.3, 0.6), "generate_kwargs": KWARGS}
    found = [
        search(stored(pipeline(), form), prompts(count=1), recipe, **options).recipe
        for form in ("plain", "sequential offload")
    ]
    assert found[0] == found[1]
