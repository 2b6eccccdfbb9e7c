"""Tiny transformers alone, with random weights, and inputs of a known latent grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

Grid = tuple[int, int, int]
Inputs = dict[str, Any]


@contextmanager
def _unset_is_nan() -> Iterator[None]:
    """Tensors that nobody fills hold NaN, in place of what was in memory before."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class TinyModel:
    """A transformer class, what its forward is given, and where its latents then lie.

    Attributes:
        kind: class name in diffusers.
        config: of a tiny one.
        inputs: of one forward, all random numbers from the generator.
        grid: latent frames, height and width in tokens.
        start: of the latents in an attention sequence.
        seq_len: tokens of an attention sequence.
        also: start and tokens of the sequences that other layers or samples have.
        axes: of ``latents``, a letter each; "s" are packed tokens, "j" images, the last of which goes first.
        patch: latent frames, rows and columns of a token.
        latents: name of the argument that holds them.
        offset: packed tokens before the grid.
        queries: first and number of the tokens that query, where not all do.
        unread: packed tokens at the begin whose output the pipeline drops, and which may be anything.
        aside: why calls of a layer that hold no latents stay dense.
        dtype: of weights and inputs; float32 where the model cannot do without it.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], Inputs]
    grid: Grid
    seq_len: int
    start: int = 0
    also: tuple[tuple[int, int], ...] = ()
    axes: str = "bcfhw"
    patch: Grid = (1, 1, 1)
    latents: str = "hidden_states"
    offset: int = 0
    queries: tuple[int, int] | None = None
    unread: int = 0
    aside: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """Of a comparison, as a share of the largest number."""
        return 1e-9 if self.dtype == torch.float64 else 1e-4

    @property
    def layouts(self) -> dict[int, int]:
        """Where the latents start in each sequence, by its length."""
        return {self.seq_len: self.start} | {length: start for start, length in self.also}

    def build(self) -> Any:
        if not hasattr(diffusers, self.kind):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.kind}")
        torch.manual_seed(0)
        with _unset_is_nan():
            model = getattr(diffusers, self.kind)(**self.config).eval().to(self.dtype)
        # What training would have moved: gates and tables that begin at zero hide a layer, and some begin as whatever
        # the memory held.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and not (bool(parameter.any()) and bool(parameter.isfinite().all())):
                    parameter.normal_(std=0.1)
        return model

    def given(self) -> Inputs:
        """The inputs of one forward, the same every time."""
        return _cast(self.inputs(torch.Generator().manual_seed(0)), self.dtype)

    @torch.no_grad()
    def run(self, model: Any, given: Inputs | None = None) -> torch.Tensor:
        out = model(**self.given() if given is None else given, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out[:, self.unread :]

    def nudged(self, place: Grid) -> Inputs:
        """The inputs with the latents of one token changed."""
        given = self.given()
        index: list[Any] = []
        for axis in self.axes:
            if axis == "s":
                f, h, w = place
                index.append(self.offset + (f * self.grid[1] + h) * self.grid[2] + w)
            elif axis == "j":
                index.append(place[0] - 1)
            elif axis in "fhw":
                size, at = self.patch["fhw".index(axis)], place["fhw".index(axis)]
                index.append(slice(at * size, (at + 1) * size))
            else:
                index.append(slice(None))
        held = given[self.latents]
        latents = held[0] if isinstance(held, list) else held
        latents[tuple(index)] += 1.0
        return given


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with every tensor of float64 in another dtype."""
    if isinstance(value, dict):
        return {name: _cast(held, dtype) for name, held in value.items()}
    if isinstance(value, list):
        return [_cast(held, dtype) for held in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype == torch.float64 else value


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def key_mask(length: int, hidden: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """``[1, length]`` with the last keys hidden."""
    return (torch.arange(length) < length - hidden)[None].to(dtype)


def time_of(value: float = 500.0) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def text_to_video(channels: int, text: int = 16) -> Callable[[torch.Generator], Inputs]:
    """Inputs of a video of 2 x 24 x 14 latents and a prompt of 12 tokens."""

    def inputs(g: torch.Generator) -> Inputs:
        return {
            "hidden_states": randn(g, 1, channels, 2, 24, 14),
            "timestep": time_of(),
            "encoder_hidden_states": randn(g, 1, 12, text),
        }

    return inputs
