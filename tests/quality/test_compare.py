"""compare(): pairing, bookkeeping and honesty with a fake pipeline, and once with a real tiny one."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel.parts import Parts
from dit_accel.quality import flicker
from dit_accel.quality.compare import compare
from dit_accel.quality.generation import generate_clip
from dit_accel.quality.metrics import METRICS
from dit_accel.quality.prompts import DEFAULT_PROMPTS
from dit_accel.quality.results import DENSE
from dit_accel.quality.video import ClipPair
from tests.quality.clips import moving_clip


@dataclass
class FakePipe:
    """Clips that depend on prompt and noise; a patch adds its error."""

    error: float = 0.0
    calls: list[tuple[str, int, float]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    patched_with: Any = None

    def __call__(
        self,
        prompt: str,
        generator: torch.Generator,
        output_type: str,
        num_inference_steps: int = 10,
        callback_on_step_end: Any = None,
    ) -> SimpleNamespace:
        assert output_type == "np"
        noise = torch.randn(3, generator=generator)
        self.calls.append((prompt, num_inference_steps, float(noise[0])))
        self.log.append("dense" if self.patched_with is None else str(self.patched_with))
        latents = noise.expand(1, 2, 3) + self.error
        for step in range(num_inference_steps):
            callback_on_step_end(self, step, 0, {"latents": latents * (step + 1) / num_inference_steps})
        clip = moving_clip(3, 40, 48, speed=1 + abs(float(noise[0]))) * 0.8 + 0.1 * len(prompt) / 50
        return SimpleNamespace(frames=(clip + self.error).numpy()[None])


class FakeHandle:
    """Four attention calls a step: dense in the first half of the steps, then at the recipe's density."""

    def __init__(self, pipe: FakePipe, recipe: Any) -> None:
        if pipe.patched_with is not None:
            raise ValueError("patched already")
        self.pipe, self.recipe, self.start = pipe, recipe, len(pipe.calls)
        pipe.patched_with = recipe
        self.error = 0.0 if recipe == "dense" else recipe["error"]
        pipe.error = self.error

    def summary(self) -> SimpleNamespace:
        steps = [steps for _, steps, _ in self.pipe.calls[self.start :]]
        dense = 4 * sum(steps) if self.recipe == "dense" else 2 * sum(steps)
        sparse = 4 * sum(steps) - dense
        density = None if not steps else (dense + 0.25 * sparse) / (dense + sparse)
        return SimpleNamespace(
            sparse_calls=sparse,
            dense_calls={"first steps": dense} if dense else {},
            nan_calls=0,
            replayed_calls=0,
            mean_density=density,
            density=0.25 if sparse else None,
            computed_forwards=sum(steps),
            skipped_forwards=0,
            backends={"attention": {"fake": "test"}},
            plan_seconds=0.01 * sparse,
            sparse_seconds=0.1 * sparse,
            dense_seconds=0.5 * dense,
        )

    def __enter__(self) -> FakeHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipe.error, self.pipe.patched_with = 0.0, None


_RECIPES = {"exact": {"error": 0.0}, "off/by": {"error": 0.02}}


def test_everything_is_paired(tmp_path: Path) -> None:
    pipe = FakePipe()
    lines: list[str] = []
    report = compare(
        pipe, _RECIPES, ["a cat", "a dog"], [3, 4], out=tmp_path, patch=FakeHandle, progress=lines.append,
        metrics=["psnr", "ssim", "latent_mse"], generate_kwargs={"num_inference_steps": 6},
    )  # fmt: skip
    assert report.pairs == (("a cat", 3), ("a cat", 4), ("a dog", 3), ("a dog", 4))
    assert report.recipes == ("exact", "off/by")
    # A warm-up of two steps for each side, then clip by clip each side once, and one clip again with timers.
    assert [steps for _, steps, _ in pipe.calls] == [2] * 3 + [6] * 13
    assert pipe.log[:3] == ["dense", str(_RECIPES["exact"]), str(_RECIPES["off/by"])]
    turn = pipe.log[:3]
    assert pipe.log[3:] == [*turn, "dense", *turn[::-1], *turn, *turn[::-1]]
    noises = [noise for _, _, noise in pipe.calls[3:6] + pipe.calls[7:]]
    assert [len(set(noises[n : n + 3])) for n in range(0, 12, 3)] == [1] * 4
    assert noises[0] == noises[6] != noises[3]  # seeds 3 and 4, of each prompt
    assert pipe.patched_with is None
    assert len(lines) == 13

    exact, off = report.summary("exact"), report.summary("off/by")
    assert exact.metrics["psnr"].mean == math.inf
    assert exact.metrics["latent_mse"].mean == 0
    # 0.02 is 5.1 levels, and both clips are rounded to 8 bits.
    assert off.metrics["psnr"].mean == pytest.approx(-20 * math.log10(5.1 / 255), abs=0.2)
    assert off.metrics["latent_mse"].mean == pytest.approx(0.02**2, rel=1e-3)
    # The warm-up is not counted: 12 dense calls and 12 at a quarter.
    assert off.density is not None
    assert off.density.mean == pytest.approx((12 + 0.25 * 12) / 24)
    assert off.attention_seconds is not None
    assert off.attention_seconds.mean == pytest.approx(12 * 0.5 + 12 * 0.11)
    dense = report.result(DENSE, "a cat", 3)
    assert dense.attention_seconds == pytest.approx(24 * 0.5)
    assert report.result(DENSE, "a cat", 4).attention_seconds is None
    assert "off/by: 48 of 96 self-attention calls ran dense (48 first steps)." in report.notes
    assert report.facts["settings"] == "num_inference_steps=6"

    tree = json.loads((tmp_path / "report.json").read_text())
    assert tree["recipes"] == ["exact", "off/by"]
    assert len(list((tmp_path / "clips").iterdir())) == 12
    assert (tmp_path / "index.html").is_file()
    assert (tmp_path / "side_by_side.mp4").is_file()


def test_the_dense_clips_flow_is_found_once_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all recipes and metrics; the values are those of each pair by itself."""
    found: list[ClipPair] = []
    by_itself = flicker._reference_flow
    monkeypatch.setattr(flicker, "_reference_flow", lambda pair: found.append(pair) or by_itself(pair))
    clips: dict[tuple[str, str], torch.Tensor] = {}
    names = ["flicker_flow", "flicker_excess"]
    report = compare(
        FakePipe(), _RECIPES, ["a cat", "a dog"], out=tmp_path, patch=FakeHandle, metrics=names, pictures=False,
        on_clip=lambda name, prompt, seed, made: clips.update({(name, prompt): made.frames}),
    )  # fmt: skip
    assert len(found) == 2
    for name in _RECIPES:
        for prompt in ("a cat", "a dog"):
            pair = ClipPair(clips[DENSE, prompt], clips[name, prompt])
            alone = {metric: METRICS[metric](pair) for metric in names}
            assert {key: one.value for key, one in report.result(name, prompt, 0).metrics.items()} == alone


def test_a_broken_recipe_fails_before_anything_is_generated(tmp_path: Path) -> None:
    pipe = FakePipe()

    def patch(target: Any, recipe: Any) -> FakeHandle:
        if recipe == "broken":
            raise ValueError("unknown recipe 'broken'")
        return FakeHandle(target, recipe)

    recipes = {"exact": {"error": 0.0}, "broken": "broken"}
    with pytest.raises(ValueError, match="unknown recipe 'broken'"):
        compare(pipe, recipes, ["a cat"], out=tmp_path, patch=patch)
    assert pipe.calls == []
    assert pipe.patched_with is None


def test_every_run_has_a_patch_of_its_own(tmp_path: Path) -> None:
    """Nothing of a warm-up or of another clip is there: what a patch keeps would be in its summary."""
    pipe = FakePipe()
    report = compare(
        pipe, {"exact": {"error": 0.0}}, ["a cat", "a dog"], out=tmp_path, patch=FakeHandle, metrics=["psnr"],
        generate_kwargs={"num_inference_steps": 4}, repeat=2,
    )  # fmt: skip
    # 4 calls a step, 4 steps; a summary of more than one run would have multiples.
    for prompt in ("a cat", "a dog"):
        assert report.result("exact", prompt, 0).attention_seconds == pytest.approx(8 * 0.5 + 8 * 0.11)
    assert report.facts["runs"] == (
        "each clip 2 times dense and 2 times under each recipe, in turns; patched anew for every run"
    )
    assert report.facts["warm-up"] == "2 untimed steps of dense and of each recipe, at the same size"
    assert "exact: 16 of 32 self-attention calls ran dense (16 first steps)." in report.notes


@pytest.mark.parametrize("repeat", [1, 2, 3])
def test_repeats_are_in_turns(repeat: int, tmp_path: Path) -> None:
    pipe = FakePipe()
    report = compare(
        pipe, {"exact": "pooled"}, ["a cat", "a dog"], out=tmp_path, patch=_ExactHandle, metrics=["psnr"],
        warm_up=False, dense_attention_clips=0, repeat=repeat,
    )  # fmt: skip
    pair = ["dense", "pooled"]
    assert pipe.log == [name for turn in range(2 * repeat) for name in (pair if turn % 2 == 0 else pair[::-1])]
    for result in report.results:
        assert len(result.seconds) == repeat
        assert result.total_seconds == pytest.approx(sorted(result.seconds)[repeat // 2], rel=0.9)
    assert report.summary("exact").speedup.count == 2 * repeat
    assert report.summary("exact").metrics["psnr"].count == 2


class _ExactHandle(FakeHandle):
    """Of a recipe that is a name, and changes nothing."""

    def __init__(self, pipe: FakePipe, recipe: Any) -> None:
        super().__init__(pipe, {"error": 0.0})
        pipe.patched_with = recipe


def test_asked_for_one_step_it_warms_up_with_one(tmp_path: Path) -> None:
    pipe = FakePipe()
    arguments = {"num_inference_steps": 1}
    report = compare(pipe, _RECIPES, ["a cat"], out=tmp_path, patch=FakeHandle, generate_kwargs=arguments, metrics=())
    assert {steps for _, steps, _ in pipe.calls} == {1}
    assert report.facts["warm-up"].startswith("1 untimed steps")


def test_a_warm_up_without_a_sparse_call_is_said(tmp_path: Path) -> None:
    class LateHandle(FakeHandle):
        def summary(self) -> SimpleNamespace:
            found = super().summary()
            found.sparse_calls = max(0, found.sparse_calls - 8)
            return found

    arguments = {"num_inference_steps": 10}
    report = compare(
        FakePipe(), _RECIPES, ["a cat"], out=tmp_path, patch=LateHandle, generate_kwargs=arguments, metrics=["psnr"]
    )
    assert sum("the warm-up ran no sparse call" in note for note in report.notes) == 2


def test_a_run_that_breaks_leaves_the_clips_it_finished(tmp_path: Path) -> None:
    class BreakingHandle(FakeHandle):
        def summary(self) -> SimpleNamespace:
            if self.error and len(self.pipe.calls) > 4:
                raise RuntimeError("out of memory")
            return super().summary()

    pipe = FakePipe()
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(pipe, _RECIPES, ["a cat", "a dog"], out=tmp_path, patch=BreakingHandle, metrics=["psnr"], warm_up=False)
    tree = json.loads((tmp_path / "report.json").read_text())
    assert tree["recipes"] == ["exact", "off/by"]
    assert [result["prompt"] for result in tree["results"]] == ["a cat"] * 3
    assert (tmp_path / "index.html").is_file()
    assert pipe.patched_with is None


def test_what_was_finished_is_not_made_again(tmp_path: Path) -> None:
    parts = Parts(tmp_path)
    parts.claim({})
    asked = {"out": tmp_path, "patch": FakeHandle, "metrics": ["psnr"], "pictures": False, "parts": parts}
    first = FakePipe()
    compare(first, _RECIPES, ["a cat"], **asked)
    made: list[tuple[str, str, int]] = []
    again = FakePipe()
    report = compare(
        again,
        _RECIPES,
        ["a cat", "a dog"],
        **asked,
        on_clip=lambda name, prompt, seed, _: made.append((name, prompt, seed)),
    )
    assert report.pairs == (("a cat", 0), ("a dog", 0))
    assert {prompt for prompt, steps, _ in again.calls if steps > 2} == {"a dog"}
    assert made == [(name, "a dog", 0) for name in ("dense", *_RECIPES)]
    # All of a finished clip is there: its metrics, and what the patch did.
    assert report.summary("exact").metrics["psnr"].mean == math.inf
    assert "off/by: 40 of 80 self-attention calls ran dense (40 first steps)." in report.notes
    nothing = FakePipe()
    whole = compare(nothing, _RECIPES, ["a cat", "a dog"], **asked)
    assert nothing.calls == []
    assert whole.to_json() == report.to_json()
    assert not (tmp_path / "clips").exists()
    parts.path("0001").write_text('{"results": [{}]}')
    with pytest.raises(
        ValueError, match=r"0001\.json holds no clip of a comparison; delete it, or give another folder"
    ):
        compare(nothing, _RECIPES, ["a cat", "a dog"], **asked)


def test_a_recipe_that_breaks_does_so_in_its_warm_up(tmp_path: Path) -> None:
    class BreakingHandle(FakeHandle):
        def summary(self) -> SimpleNamespace:
            raise RuntimeError("out of memory")

    pipe = FakePipe()
    with pytest.raises(RuntimeError, match="out of memory"):
        compare(pipe, _RECIPES, ["a cat"], out=tmp_path, patch=BreakingHandle)
    assert {steps for _, steps, _ in pipe.calls} == {2}
    assert not (tmp_path / "report.json").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    pipe = FakePipe()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="Cannot write in"):
        compare(pipe, _RECIPES, ["a cat"], out=tmp_path / "file", patch=FakeHandle)
    assert pipe.calls == []


def test_a_recipe_that_gives_nan_has_reasons_not_numbers(tmp_path: Path) -> None:
    recipes = {"nan": {"error": math.nan}}
    report = compare(FakePipe(), recipes, ["a cat"], out=tmp_path, patch=FakeHandle, warm_up=False)
    result = report.result("nan", "a cat", 0)
    assert {m.value for m in result.metrics.values()} == {None}
    assert "NaN" in str(result.metrics["psnr"].reason)


def test_unmeasured_dense_attention(tmp_path: Path) -> None:
    report = compare(
        FakePipe(), {"exact": {"error": 0.0}}, ["a cat"], out=tmp_path, patch=FakeHandle, metrics=["psnr"],
        dense_attention_clips=0, warm_up=False,
    )  # fmt: skip
    assert report.summary(DENSE).attention_seconds is None
    assert report.summary("exact").attention_speedup is None
    assert report.facts["warm-up"] == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be a non-empty sequence without repeats"),
        ({"prompts": "a cat"}, "must be a sequence of strings, got the string 'a cat'"),
        ({"seeds": [1, 1]}, r"seeds must be a non-empty sequence without repeats, got \[1, 1\]"),
        ({"recipes": {}}, "at least one recipe"),
        ({"recipes": {"dense": "dense"}}, "none named 'dense'"),
        ({"metrics": ["fvd"]}, "unknown metric 'fvd'"),
        ({"generate_kwargs": {"generator": 1}}, "must not set generator"),
        ({"repeat": 0}, "repeat must be at least 1, got 0"),
    ],
)
def test_bad_arguments(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments = {"recipes": _RECIPES, "prompts": ["a cat"], "seeds": [0]} | changes
    with pytest.raises(ValueError, match=message):
        compare(FakePipe(), out=tmp_path, patch=FakeHandle, **arguments)


def test_image_pipelines() -> None:
    def pipe(prompt: str, generator: torch.Generator, output_type: str) -> SimpleNamespace:
        return SimpleNamespace(images=np.full((2, 8, 9, 3), 0.5, np.float32))

    made = generate_clip(pipe, "a cat", 0)
    assert made.frames.shape == (1, 8, 9, 3)
    assert made.latents is None


def test_default_prompts() -> None:
    assert len(set(DEFAULT_PROMPTS)) >= 16


@pytest.mark.filterwarnings("ignore")
def test_a_real_pipeline(tmp_path: Path) -> None:
    """A tiny Wan, really patched: dense under the patch is exact, a coarse recipe is not."""
    from dit_accel import presets
    from tests.tiny import TINY

    tiny = TINY["wan"]
    pipe = tiny.build()
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = lambda **_: (torch.full((1, 16, 32), 0.1), None)
    arguments = {
        "height": 224,
        "width": 256,
        "num_frames": 1,
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
    }
    recipes = {"untouched": "dense", "coarse": presets.pooled(density=0.1, dense_fraction=0.0)}
    report = compare(
        pipe, recipes, ["a cat"], out=tmp_path, metrics=["psnr", "latent_mse"],
        generate_kwargs=arguments, warm_up=False,
    )  # fmt: skip
    assert report.summary("untouched").metrics["psnr"].mean == math.inf
    assert report.summary("untouched").density.mean == 1
    coarse = report.summary("coarse")
    assert coarse.density.mean < 0.9
    assert coarse.metrics["latent_mse"].mean > 0
    assert coarse.attention_seconds.mean > 0
    assert coarse.attention_speedup is not None


def _real_pipe() -> Any:
    from tests.tiny import TINY

    pipe = TINY["wan"].build()
    pipe.set_progress_bar_config(disable=True)
    pipe.encode_prompt = lambda prompt, **_: (torch.full((1, 16, 32), len(prompt) / 100), None)
    return pipe


_REAL = {"height": 224, "width": 256, "num_frames": 1, "guidance_scale": 1.0, "num_inference_steps": 5}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
def test_clips_are_what_a_first_run_gives(compiled: bool, tmp_path: Path) -> None:
    """The clip of a recipe is that of a pipeline patched for it alone, not one with a warm-up's plan."""
    import dit_accel
    from dit_accel import presets

    phase = {"schedule.few_steps": 0}
    kept = presets.pooled(density=0.3, dense_fraction=0.2).with_fields({"schedule.refresh_every": 100, **phase})
    recipes = {"search": presets.mass(density=0.3, dense_fraction=0.4).with_fields(phase), "kept": kept}
    pipe = _real_pipe()
    if compiled:
        for block in pipe.transformer.blocks:
            block.compile(backend="eager")
    report = compare(
        pipe, recipes, ["a cat", "a quick brown fox"], out=tmp_path, metrics=["latent_mse"], generate_kwargs=_REAL
    )
    assert ("compiled" in report.facts["runs"]) == compiled
    for name, recipe in recipes.items():
        for prompt in ("a cat", "a quick brown fox"):
            alone = _real_pipe()
            dense = generate_clip(alone, prompt, 0, _REAL).latents
            with dit_accel.patch(alone, recipe) as handle:
                fast = generate_clip(alone, prompt, 0, _REAL).latents
            assert report.result(name, prompt, 0).density == pytest.approx(handle.summary().mean_density)
            said = report.result(name, prompt, 0).metrics["latent_mse"].value
            assert said == pytest.approx(float((dense - fast).square().mean()), rel=1e-3)
    assert any("search step" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore")
def test_no_recipe_is_what_the_patch_does_by_itself(tmp_path: Path) -> None:
    """A sequence too short to gain stays dense, as it does for a user."""
    report = compare(_real_pipe(), {"auto": None}, ["a cat"], out=tmp_path, metrics=["psnr"], generate_kwargs=_REAL)
    assert report.result("auto", "a cat", 0).density == 1
    assert report.summary("auto").metrics["psnr"].mean == math.inf
    assert any("too few to gain" in note for note in report.notes)
    assert report.descriptions == {"auto": "patch(pipe) without a recipe"}
