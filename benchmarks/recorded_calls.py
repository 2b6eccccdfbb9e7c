"""Queries, keys and values of a built-in model's self-attention in runs, dense ones where nothing else is asked.

In files, which the laboratory works on, each of one prompt: every layer and guidance branch at some steps. Tensors are
kept in half precision: what was rounded there is an exact input of every method and of its reference. In memory, where
a gate or a router is trained: as they were, with the blocks of a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel import patch, presets
from dit_accel.call import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.pipelines import load
from dit_accel.pipelines.generate import call_arguments


@dataclass(frozen=True, eq=False)
class Recorded:
    """One attention call: tensors ``[H, S, D]`` in raster order."""

    prompt: int
    layer: int
    branch: str
    step: int
    grid: tuple[int, int, int]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def layout(self) -> TokenLayout:
        """The tokens of the call: the built-in video models have no others than latents."""
        return TokenLayout(self.grid, 0, self.q.shape[1])


@dataclass(frozen=True)
class Recording:
    """Which calls of which runs are kept.

    Attributes:
        model: name of a built-in model of Wan's class.
        steps: of the run, whose calls are kept.
        num_steps: of the run.
        layers: whose calls are kept; None keeps all.
        guidance: None is the model's own; 1 runs one branch, at half the time.
        density: None runs dense. Else the run is of the preset ``mass``: its calls then lie on a trajectory that this
            already moved, while queries, keys and values of a call are exact inputs all the same.
    """

    model: str
    steps: tuple[int, ...]
    num_steps: int
    layers: tuple[int, ...] | None = None
    guidance: float | None = None
    density: float | None = None


def pipeline(device: str, dtype: torch.dtype = torch.float32, model: str = "embedded") -> Any:
    """A built-in model, which shows no progress."""
    pipe = load(model, dtype=dtype, device=torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompts: Iterable[tuple[int, str]], **settings: Any) -> None:
    """Runs up to the latents, each with a seed and a prompt.

    Args:
        settings: width, height, frames, steps and guidance, where they are not the model's own.
    """
    arguments = call_arguments(pipe, **settings)
    for seed, prompt in prompts:
        pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **arguments)


def calls_in_memory(
    pipe: Any, prompts: Iterable[tuple[int, str]], *, density: float, **settings: int
) -> list[AttentionCall]:
    """Calls of every layer at every second step, the first guidance branch alone, with plans of the preset ``seer``,
    whose blocks gates and routers choose among; see :func:`run`."""
    found: list[AttentionCall] = []

    def see(_name: str, call: AttentionCall) -> None:
        if call.plan is not None and (call.step.index or 0) % 2 == 0 and call.step.branch in ("cond", None):
            found.append(call)

    with patch(pipe, "seer", density=density) as handle:
        keep = lambda _layer, out, dense: out if dense is None else dense()  # noqa: E731
        with handle.observe(see), handle.tap_outputs(keep), torch.no_grad():
            run(pipe, prompts, **settings)
    return found


def record(
    folder: Path, prompts: list[tuple[int, str]], wanted: Recording, device: str, dtype: torch.dtype = torch.float32
) -> None:
    """Write a file for each prompt that has none, seeds being the prompts' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(number, prompt) for number, prompt in prompts if not file_of(folder, number).exists()]
    if not missing:
        return
    pipe = pipeline(device, dtype, wanted.model)
    recipe = presets.dense() if wanted.density is None else presets.mass(density=wanted.density)
    for number, prompt in missing:
        calls: list[dict[str, object]] = []

        def keep(_: str, call: AttentionCall) -> None:
            if call.step.index in wanted.steps and (wanted.layers is None or call.layer in wanted.layers):
                assert isinstance(call.layout, TokenLayout)
                tensors = {name: getattr(call, name)[0].transpose(0, 1).half().cpu().contiguous() for name in "qkv"}
                place = {"layer": call.layer, "branch": str(call.step.branch), "step": call.step.index}
                calls.append(place | {"grid": tuple(call.layout.grid)} | tensors)  # noqa: B023

        with patch(pipe, recipe) as handle, handle.observe(keep):
            run(pipe, [(number, prompt)], steps=wanted.num_steps, guidance=wanted.guidance)
        torch.save({"prompt": prompt, **vars(wanted), "calls": calls}, file_of(folder, number))


def file_of(folder: Path, number: int) -> Path:
    """Where the calls of a prompt are."""
    return folder / f"calls_{number}.pt"


def facts_of(folder: Path, number: int) -> dict[str, Any]:
    """The model, run and heads of the calls of a prompt."""
    kept = torch.load(file_of(folder, number), mmap=True)
    first = kept["calls"][0]
    of_run = {name: kept.get(name) for name in ("model", "num_steps", "guidance")}
    return {
        **of_run,
        "trajectory": "dense" if kept.get("density") is None else f"mass at {kept['density']}",
        "heads": first["q"].shape[0],
        "tokens": first["q"].shape[1],
        "grid": list(first["grid"]),
    }


def read(folder: Path, numbers: list[int]) -> Iterator[Recorded]:
    """The calls of some prompts, a file at a time."""
    for number in numbers:
        kept = torch.load(file_of(folder, number), mmap=True)
        for call in kept["calls"]:
            yield Recorded(number, **call)
