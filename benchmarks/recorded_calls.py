"""Queries, keys and values of the embedded model's self-attention, kept in files: what the laboratory works on.

A file is of one prompt: every layer and guidance branch at some steps of a dense run. Tensors are kept in half
precision: what was rounded there is an exact input of every method and of its reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_accel import patch
from dit_accel.call import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
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
        """The tokens of the call: the embedded model has no others than latents."""
        return TokenLayout(self.grid, 0, self.q.shape[1])


def record(
    folder: Path,
    prompts: list[tuple[int, str]],
    steps: tuple[int, ...],
    num_steps: int,
    device: str,
    dtype: torch.dtype,
) -> None:
    """Write a file for each prompt that has none, seeds being the prompts' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(number, prompt) for number, prompt in prompts if not file_of(folder, number).exists()]
    if not missing:
        return
    pipe = load("embedded", dtype=dtype, device=torch.device(device))
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(pipe, **(vars(builtins()["embedded"].settings) | {"steps": num_steps}))
    for number, prompt in missing:
        calls: list[dict[str, object]] = []

        def keep(_: str, call: AttentionCall) -> None:
            if call.step.index in steps:
                assert isinstance(call.layout, TokenLayout)
                tensors = {name: getattr(call, name)[0].transpose(0, 1).half().cpu().contiguous() for name in "qkv"}
                place = {"layer": call.layer, "branch": str(call.step.branch), "step": call.step.index}
                calls.append(place | {"grid": tuple(call.layout.grid)} | tensors)  # noqa: B023

        with patch(pipe, "dense") as handle, handle.observe(keep):
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(number), output_type="latent", **arguments)
        torch.save({"prompt": prompt, "num_steps": num_steps, "calls": calls}, file_of(folder, number))


def file_of(folder: Path, number: int) -> Path:
    """Where the calls of a prompt are."""
    return folder / f"calls_{number}.pt"


def read(folder: Path, numbers: list[int]) -> Iterator[Recorded]:
    """The calls of some prompts, a file at a time."""
    for number in numbers:
        kept = torch.load(file_of(folder, number), mmap=True)
        for call in kept["calls"]:
            yield Recorded(number, **call)
