"""What a patch must know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..ambient import LatentTokens

PatchSize = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as users say it.
        transformers: class names of its transformers. Names, so that no model code is imported.
        self_attention: patterns of the module paths whose attention mixes latent tokens.
        read: the latent tokens of a forward, from the latent size of a token and the forward's arguments.
        text_first: whether other tokens come before the latents in the sequence, else behind them.
        min_tokens: sequence length below which sparse attention gains nothing on a GPU.
    """

    name: str
    transformers: tuple[str, ...]
    self_attention: tuple[str, ...]
    read: Callable[[PatchSize, Mapping[str, Any]], LatentTokens]
    text_first: bool = False
    min_tokens: int = 8192

    def has_self_attention(self, module_path: str) -> bool:
        """Whether the module at this path is one of the family's self-attentions."""
        return any(fnmatchcase(module_path, pattern) for pattern in self.self_attention)


def patch_size(config: Mapping[str, Any]) -> PatchSize:
    """Latent frames, rows and columns of one token, from a transformer's config."""
    size = config.get("patch_size") or 1
    if isinstance(size, (tuple, list)):
        return (1, size[0], size[1]) if len(size) == 2 else (size[0], size[1], size[2])
    return (config.get("patch_size_t") or 1, size, size)


def grid_tokens(frames: int, height: int, width: int, patch: PatchSize) -> LatentTokens:
    """Latent tokens of latents with this many frames, rows and columns."""
    grid = (frames // patch[0], height // patch[1], width // patch[2])
    return LatentTokens(grid, grid[0] * grid[1] * grid[2])
