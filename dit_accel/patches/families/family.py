"""What a patch must know of a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from ...layout import LatentGrid
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
        read_ids: what is generated, then references, from the positions of the latent stream's tokens, for forwards
            that pass no size; raises ValueError where there is no grid.
        latents_query: whether the latent stream alone may query, and other tokens be keys alone.
        text_first: whether other tokens come before the latents in the sequence, else behind them.
        alone: whether sequences that hold other tokens too stay dense, since nobody has said where these lie.
        min_tokens: sequence length below which sparse attention gains nothing on a GPU.
        timestep: name of the argument that holds it.
        masked: where the latents of a call with a mask are: where they are without one ("there"), before all others
            ("first"), or in each sample of the batch at another place ("apart").
        masks_pairs: whether the layers of a forward are all given one mask of pairs, keys x queries, whose padded rows
            are read nowhere.
        adds_pairs: whether the layers of a forward are all given one mask of pairs that is added to the logits, 0 where
            a key is seen and the least number of its dtype elsewhere.
    """

    name: str
    transformers: tuple[str, ...]
    self_attention: tuple[str, ...]
    read: Callable[[PatchSize, Mapping[str, Any]], LatentTokens]
    read_ids: Callable[[torch.Tensor], Sequence[LatentGrid]] | None = None
    text_first: bool = False
    latents_query: bool = False
    alone: bool = False
    min_tokens: int = 8192
    timestep: str = "timestep"
    masked: Literal["there", "first", "apart"] = "there"
    masks_pairs: bool = False
    adds_pairs: bool = False

    def place(self, latents: LatentTokens) -> LatentTokens:
        """Latent tokens known by their positions, with the grid read off these; without a grid where there is none."""
        assert latents.ids is not None
        assert self.read_ids is not None
        try:
            generated, *references = self.read_ids(latents.ids.detach())
        except ValueError:
            return LatentTokens((), latents.tokens)
        others = tuple((*part.grid, part.start) for part in references)
        return LatentTokens(generated.grid, latents.tokens, None, generated.start, others)

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


def read_video(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    """``hidden_states`` are latents (B, C, F, H, W)."""
    _, _, frames, height, width = arguments["hidden_states"].shape
    return grid_tokens(frames, height, width, patch)


def read_frames(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    """``hidden_states`` are latents (B, F, C, H, W), frames before channels."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    return grid_tokens(frames, height, width, patch)


def read_image(patch: PatchSize, arguments: Mapping[str, Any]) -> LatentTokens:
    """``hidden_states`` are latents (B, C, H, W)."""
    height, width = arguments["hidden_states"].shape[-2:]
    return grid_tokens(1, height, width, patch)
