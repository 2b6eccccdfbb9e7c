"""A tiny pipeline is tuned from end to end, on a clock that counts work in place of seconds."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from dit_accel import Recipe, patch, presets, tune
from dit_accel.engine import Engine
from dit_accel.patches.targets import root_hook
from dit_accel.stages.reuse.listed import Listed
from dit_accel.tuning import clips
from dit_accel.tuning.result import Tuned
from tests.calibration.test_runs import prompts
from tests.tiny import TINY

STEPS = 6
KWARGS: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 9,
    "num_inference_steps": STEPS,
    "guidance_scale": 5.0,
}
BASE = presets.mass(block=(32, 32))
# Runs of a prompt that only fit the model: dense, three lists, three densities; one dense step is all that six have.
PARTS = 7


def pipeline() -> Any:
    pipe = TINY["wan"].build(2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Work:
    """Blocks that ran, an attention half of one, which sparse calls do a part of; and the calls of the pipeline."""

    def __init__(self) -> None:
        self.amount = 0.0
        self.computed: list[int] = []

    def of(self, pipe: Any) -> Any:
        def count(*_: Any) -> None:
            self.amount += 1.0

        for block in pipe.transformer.blocks:
            block.register_forward_hook(count)
        pipe.transformer.blocks[-1].register_forward_hook(
            lambda *_: self.computed.append(pipe.scheduler.step_index or 0)
        )
        return pipe


@pytest.fixture
def work(monkeypatch) -> Work:
    counted = Work()
    attend = Engine.attend

    def cheaper(self: Engine, call: Any, dense: Any, learned: Any = None) -> torch.Tensor:
        ran: list[int] = []

        def whole() -> Any:
            ran.append(1)
            return dense()

        out = attend(self, call, whole, learned)
        if not ran:
            # In parts of two, so that sums are the same in any order.
            counted.amount -= round((1.0 - (self.recipe.select.density or 0.0)) * 64) / 128
        return out

    monkeypatch.setattr(Engine, "attend", cheaper)
    monkeypatch.setattr(clips, "now", lambda _pipe: counted.amount)
    return counted


def run(pipe: Any, out: Path | None, target: str = "psnr=50", **changes: Any) -> Tuned:
    options = {"recipe": BASE, "generate_kwargs": KWARGS, "prompts": prompts(), **changes}
    return tune(pipe, options.pop("prompts"), target, out=out, **options)


def decibels(recipe: Recipe, prompt: dict[str, Any], seed: int) -> float:
    """Measured afresh: float64 of 8-bit frames."""

    def frames(patched: bool) -> np.ndarray:
        pipe = pipeline()
        if patched:
            patch(pipe, recipe)
        generator = torch.Generator().manual_seed(seed)
        clip = pipe(**KWARGS, **prompt, generator=generator, output_type="np").frames[0]
        return np.round(clip * np.float32(255)).astype(np.float64)

    error = np.mean(((frames(True) - frames(False)) / 255) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def as_read(found: Tuned) -> Any:
    return json.loads(json.dumps(found.to_dict()))


def test_a_recipe_that_keeps_an_error_is_found_and_keeps_it(tmp_path, work, caplog):
    found = run(work.of(pipeline()), tmp_path)
    # Every run is patched anew, and all of them say this.
    assert sum("may be slower" in record.message for record in caplog.records) == 1
    recipe = Recipe.load(tmp_path / "psnr-50.json")
    assert recipe == found.recipe
    assert found.row.is_measured
    fresh = [decibels(recipe, prompt, seed) for seed, prompt in enumerate(prompts())]
    assert np.mean(fresh) == pytest.approx(found.row.fidelity, abs=1e-4)  # pixels are float32
    assert np.mean(fresh) >= 50.0
    assert found.row.speedup > 1.0
    # Nothing that was run and keeps it is faster.
    kept = [row for row in found.runs if row.fidelity >= 50.0]
    assert min(kept, key=lambda row: row.seconds) == found.row
    data = json.loads((tmp_path / "front.json").read_text())
    assert data == as_read(found)
    assert data["found"]["name"] in found.table()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert found.row.recipe.select.is_dense or any("may be slower" in note for note in found.notes)
    fronts = [row.fidelity for row in found.front]
    assert fronts == sorted(fronts)
    assert [row.seconds for row in found.front] == sorted(row.seconds for row in found.front)


def test_seconds_and_computed_steps_are_predicted_as_they_come(tmp_path, work):
    """Work has no noise: what combinations take is predicted but for the blocks that a density rounds to."""
    pipe = work.of(pipeline())
    found = run(pipe, None, "speedup=1.5")
    assert found.row.speedup >= 1.5
    combined = [row for row in found.runs if row.predicted is not None and isinstance(row.recipe.reuse, Listed)]
    assert combined
    for row in combined:
        assert row.predicted is not None
        assert row.predicted[1] == pytest.approx(row.seconds, rel=1e-9)
        work.computed.clear()
        with patch(pipe, row.recipe):
            pipe(**KWARGS, **prompts()[0], generator=torch.Generator().manual_seed(0), output_type="latent")
        assert isinstance(row.recipe.reuse, Listed)
        assert sorted(set(work.computed)) == list(row.recipe.reuse.computed)


def test_an_interrupted_tuning_goes_on_to_the_same(tmp_path, work):
    whole = run(work.of(pipeline()), tmp_path / "whole")
    # Within the second dense run, and within the second verifying one: no more are made than without a break.
    for stop in (STEPS + 2, (2 * PARTS + 2) * STEPS + 3):

        def interrupt(state: Any, stop: int = stop) -> None:
            if state.done == stop:
                raise KeyboardInterrupt

        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(work.of(pipeline()), folder, progress=interrupt)
        told: list[Any] = []
        again = run(work.of(pipeline()), folder, progress=told.append)
        assert as_read(again) == as_read(whole)
        assert len(told) == len(whole.runs) * 2 * STEPS + 2 * STEPS - (stop - 1) // STEPS * STEPS
        first = (stop - 1) // STEPS * STEPS + 1
        assert [state.done for state in told] == list(range(first, first + len(told)))
        assert all(state.done <= state.total and state.seconds_left >= 0 for state in told)
        assert {state.stage for state in told} <= {"dense", "parts", "verifying"}


def test_another_target_takes_only_the_runs_that_are_new(tmp_path, work, monkeypatch):
    first = run(work.of(pipeline()), tmp_path)
    told: list[Any] = []
    second = run(work.of(pipeline()), tmp_path, "speedup=1.3", progress=told.append)
    assert len(told) == (len(second.runs) - len(first.runs)) * 2 * STEPS
    assert {path.name for path in tmp_path.glob("*.json")} >= {"psnr-50.json", "speedup-1.3.json"}
    assert Recipe.load(tmp_path / "speedup-1.3.json") == second.recipe
    monkeypatch.setattr(clips, "patch", must_not_run)
    assert run(work.of(pipeline()), tmp_path, "speedup=1.3") == second


def test_what_no_recipe_keeps_is_said_with_the_nearest(tmp_path, work):
    with pytest.raises(ValueError, match=r"No recipe meets psnr=95 on these prompts; the nearest .* PSNR .* dB") as one:
        run(work.of(pipeline()), tmp_path, "psnr=95")
    assert "\n" not in str(one.value)
    assert not (tmp_path / "psnr-95.json").exists()
    data = json.loads((tmp_path / "front.json").read_text())
    assert data["met"] is False
    runs = [row["fidelity"] for row in data["runs"] if row["speedup"] > 1.0]
    assert data["found"]["fidelity"] == max(runs)
    with pytest.raises(ValueError, match=r"No recipe meets speedup=50 on these prompts; .*ask for less speed\."):
        run(work.of(pipeline()), tmp_path, "speedup=50")


CHANGES = {
    "steps": ({"generate_kwargs": KWARGS | {"num_inference_steps": 4}}, "num_inference_steps = 6, got 4"),
    "size": ({"generate_kwargs": KWARGS | {"height": 112}}, "height = 128, got 112"),
    "prompts": ({"prompts": prompts(3.0)}, r"prompts\.0\.prompt_embeds"),
    "fewer prompts": ({"prompts": prompts(count=1)}, "prompts = "),
    "seeds": ({"seeds": (0, 5)}, r"seeds\.1 = 1, got 5"),
    "recipe": ({"recipe": presets.mass(block=(64, 32))}, r"recipe\.select\.block"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with the dense run of one prompt."""
    folder = tmp_path_factory.mktemp("begun")

    def interrupt(state: Any) -> None:
        if state.done == STEPS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline(), folder, progress=interrupt)
    return folder


def must_not_run(*_: Any, **__: Any) -> Any:
    raise AssertionError("it ran")


@pytest.mark.parametrize("name", [*CHANGES, "weights"])
def test_another_tuning_is_not_gone_on_with(name, begun, monkeypatch):
    changes, words = CHANGES.get(name, ({}, r"pipeline\.transformer\.weights"))
    pipe = pipeline()
    if name == "weights":
        for parameter in pipe.transformer.parameters():
            parameter.data *= 1.01
    before = (begun / "state.json").read_bytes()
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
    with pytest.raises(ValueError, match=rf"is of another tuning: .*{words}.*--start-over") as caught:
        run(pipe, begun, **changes)
    assert "\n" not in str(caught.value)
    assert (begun / "state.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["half", "list", "no runs"])
def test_a_damaged_state_is_named_and_can_be_left_behind(damage, begun, tmp_path, monkeypatch):
    text = (begun / "state.json").read_text()
    data = json.loads(text)
    del data["runs"]
    (tmp_path / "state.json").write_text({"half": text[:40], "list": "[1]", "no runs": json.dumps(data)}[damage])
    with pytest.raises(ValueError, match=r"is the damaged state of a tuning \(.*--start-over") as caught:
        run(pipeline(), tmp_path)
    assert "\n" not in str(caught.value)

    def stop(_state: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipeline(), tmp_path, start_over=True, progress=stop)


def _patched(pipe: Any) -> None:
    pipe.kept = patch(pipe, "dense")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"prompts": []}, "prompts must be a non-empty sequence"),
    "target": ({"target": "psnr=x"}, "target must be NAME=VALUE"),
    "lpips": ({"target": "lpips=0.1"}, "LPIPS needs the AlexNet weights"),
    "recipe": ({"recipe": "dense"}, "needs a recipe with a density"),
    "verify": ({"verify": 0}, "verify must be at least 1, got 0"),
    "output": ({"generate_kwargs": KWARGS | {"output_type": "pil"}}, "tune sets output_type itself, got 'pil'"),
    "argument": ({"generate_kwargs": KWARGS | {"fps": 3}}, "WanPipeline takes no fps, got 3"),
    "seeds": ({"seeds": (1,)}, "seeds must be as many as prompts"),
}


@pytest.mark.parametrize("name", [*REFUSED, "patched", "one block"])
def test_refusals_are_one_sentence_before_the_first_run(name, monkeypatch):
    changes, words = REFUSED.get(name, ({}, {"patched": "is patched", "one block": "at least two blocks"}.get(name)))
    pipe = TINY["wan"].build(1) if name == "one block" else pipeline()
    if name == "patched":
        _patched(pipe)
    if name == "lpips":
        monkeypatch.setattr("dit_accel.quality.lpips.file_in_package", lambda *_: None)
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
    with pytest.raises((ValueError, RuntimeError), match=words) as caught:
        run(pipe, None, **changes)
    assert "\n" not in str(caught.value)


def test_compiled_blocks_are_compiled_before_they_are_timed(monkeypatch):
    """Patching discards compiled code."""
    calls: list[str] = []
    call = WanPipeline.__call__

    @functools.wraps(call)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["output_type"])
        return call(self, *args, **kwargs)

    def twice_as_slow_unpatched(pipe: Any) -> float:
        times.append(2.0 if root_hook(pipe.transformer) is None else 1.0)
        return sum(times)

    times: list[float] = []
    monkeypatch.setattr(WanPipeline, "__call__", noted)
    monkeypatch.setattr(clips, "now", twice_as_slow_unpatched)
    pipe = pipeline()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    asked = {"target": "psnr=10", "prompts": prompts(count=1), "verify": 1}
    compiled = run(pipe, None, **asked)
    assert calls == ["latent", "pt"] * (1 + len(compiled.runs))
    calls.clear()
    plain = run(pipeline(), None, **asked)
    # Once dense, and once for each kind of attention.
    assert calls.count("latent") == 2
    assert calls.count("pt") == 1 + len(plain.runs)
    assert compiled.row.speedup == plain.row.speedup == 2.0
    assert [row.fidelity for row in compiled.runs] == pytest.approx([row.fidelity for row in plain.runs], abs=0.1)


def test_a_dense_run_with_nan_is_refused():
    pipe = pipeline()
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="the dense pipeline gave NaN or infinite pixels for prompt 0"):
        run(pipe, None)
