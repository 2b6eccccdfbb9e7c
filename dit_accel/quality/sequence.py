"""How long a pipeline's sequence is, seen at its first attention call."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from ..api import patch
from ..call import AttentionCall
from ..layout import TokenLayout


@dataclass(frozen=True)
class Sequence:
    """Tokens of one self-attention call.

    Attributes:
        grid: latent frames, height and width in tokens.
        latent_tokens: of what is generated.
        tokens: all, with text and references.
        layers: self-attention layers of all transformers.
    """

    grid: tuple[int, int, int]
    latent_tokens: int
    tokens: int
    layers: int


class _Seen(Exception):
    """Ends a run at its first attention call."""


def first_sequence(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> Sequence | None:
    """The sequence of a run, which ends at its first attention call; None where its grid is not known.

    Args:
        pipe: a diffusers pipeline, not patched.
        arguments: of its call.
    """
    found: list[TokenLayout | str] = []

    def look(_transformer: str, call: AttentionCall) -> None:
        found.append(call.layout)
        raise _Seen

    with patch(pipe, "dense") as handle, handle.observe(look), torch.no_grad():
        with suppress(_Seen):
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), **arguments)
        layers = len(handle.summary().layers)
    layout = found[0] if found else None
    if not isinstance(layout, TokenLayout):
        return None
    frames, height, width = layout.grid
    return Sequence((frames, height, width), prod(layout.grid), layout.seq_len, layers)
