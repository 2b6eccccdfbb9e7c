"""An interrupted calibration goes on as the very same, or not at all."""

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

from dit_accel.calibration.identity import describe
from dit_accel.calibration.runs import begin
from dit_accel.plain_data import first_difference
from tests.calibration.test_runs import KWARGS, RECIPE, interrupt, must_not_run, pipeline, prompts, run
from tests.patches.test_fingerprint import with_lora
from tests.training.test_adapter_storage import stored


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
    "tuned weights": (_tuned, {}, r"pipeline\.transformer\.weights = '\w+', got '\w+'"),
    "dtype": (_half, {}, r"pipeline\.transformer\.dtypes"),
    "eight bits": (_eight_bits, {}, r"pipeline\.transformer\.dtypes"),
    "LoRA": (_lora, {}, r"pipeline\.transformer\.loras = \[\], got \['mine 1\.5'\]"),
    "fused LoRA": (_fused_lora, {}, r"got \['mine 0\.75 fused'\]"),
    "VAE": (_with_vae, {}, r"pipeline\.vae\.weights"),
    "scheduler": (_scheduler, {}, r"pipeline\.settings\.scheduler\.1 = "),
    "scheduler's settings": (_configured, {}, r"pipeline\.scheduler\.shift_terminal = None, got 0\.1"),
    "scheduler's shift": (_shifted, {}, r"pipeline\.scheduler\.shift = 3\.0, got 5\.0"),
    "pipeline's settings": (_config, {}, r"pipeline\.settings\.expand_timesteps = False, got True"),
    "embeddings": (
        None,
        {"prompts": prompts(3.0)},
        r"prompts\.0\.prompt_embeds = 'float32 \(1, 16, 32\)",
    ),
    "second embeddings": (
        None,
        {"prompts": [prompts()[0], prompts(3.0)[1]]},
        r"prompts\.1\.prompt_embeds = 'float32",
    ),
    "negative": (
        None,
        {"prompts": [{**one, "negative_prompt_embeds": torch.ones(1, 16, 32)} for one in prompts()]},
        r"prompts\.0\.negative_prompt_embeds",
    ),
    "fewer prompts": (None, {"prompts": prompts(count=1)}, "prompts = "),
    "text": (
        None,
        {"prompts": [{**one, "max_sequence_length": 9} for one in prompts()]},
        "max_sequence_length = nothing, got 9",
    ),
    "guidance": (
        None,
        {"generate_kwargs": {**KWARGS, "guidance_scale": 4.0}},
        r"guidance_scale = 5\.0, got 4",
    ),
    "steps": (
        None,
        {"generate_kwargs": {**KWARGS, "num_inference_steps": 4}},
        "num_inference_steps = 3, got 4",
    ),
    "size": (None, {"generate_kwargs": {**KWARGS, "height": 112}}, "height = 96, got 112"),
    "seeds": (None, {"seeds": (0, 7)}, r"seeds\.1 = 1, got 7"),
    "buckets": (None, {"buckets": 3}, "buckets = 2, got 3"),
    "recipe": (
        None,
        {"recipe": RECIPE.with_fields({"select.density": 0.5})},
        r"recipe\.select\.density = 0\.4, got 0\.5",
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
    monkeypatch.setattr(type(pipe), "encode_prompt", must_not_run)
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
    for mine, its in zip(given, with_generators(), strict=True):
        assert torch.equal(mine["generator"].get_state(), its["generator"].get_state())
    one, other = begin({"generator": [mine["generator"] for mine in given]}, 0)["generator"]
    sixth = torch.randn(3, generator=begin({}, 6)["generator"])
    assert not torch.equal(torch.randn(3, generator=one), sixth)
    assert torch.equal(torch.randn(3, generator=other), sixth)
    interrupt(tmp_path / "file", prompts=with_generators())
    assert torch.equal(run(pipeline(), tmp_path / "file", prompts=with_generators()), whole)
    interrupt(tmp_path / "other", prompts=with_generators())
    later = with_generators()
    torch.randn(3, generator=later[1]["generator"])
    with pytest.raises(ValueError, match=r"prompts\.1\.generator = 'generator "):
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
    with pytest.raises(ValueError, match=r"is the damaged beginning of a calibration \(.*resume=False\.") as caught:
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
            assert first_difference({"x": describe(one)}, {"x": describe(other)}) is not None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a.1.b = 2, got 3"
