"""What the nodes must know of ComfyUI's diffusion models: their self-attentions, and where the latent tokens are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import nn

from dit_accel.layout import LatentGrid, TokenLayout

Arguments = Mapping[str, Any]
LayoutOf = Callable[[int], "TokenLayout | str"]


@dataclass(frozen=True)
class Model:
    """One of ComfyUI's model classes.

    Attributes:
        lists: paths of the module lists whose entries are its blocks, in the order of execution, and within an entry
            the path of the module that attends: empty where the block does.
        layout: from the model and its forward's arguments a function from the length of a self-attention's sequence to
            its layout, or to the reason why it is not known.
        min_tokens: sequence length below which sparse attention gains nothing on a GPU.
    """

    lists: tuple[tuple[str, str], ...]
    layout: Callable[[nn.Module, Arguments], LayoutOf]
    min_tokens: int = 8192

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that attend to the latents once each, by path."""
        found: dict[str, nn.Module] = {}
        for path, inside in self.lists:
            for index, block in enumerate(getattr(model, path, ())):
                name = f"{path}.{index}.{inside}".rstrip(".")
                found[name] = block.get_submodule(inside)
        return found


def _grid(size: tuple[int, ...], patch: tuple[int, ...]) -> tuple[int, int, int]:
    """Tokens of latents of a size: ComfyUI pads each side to whole patches."""
    frames, height, width = (ceil(length / step) for length, step in zip(size, patch, strict=True))
    return frames, height, width


def _exactly(layout: TokenLayout) -> LayoutOf:
    def of(seq_len: int) -> TokenLayout | str:
        return layout if seq_len == layout.seq_len else _other(seq_len, layout.seq_len)

    return of


def _other(got: int, expected: int) -> str:
    return f"the sequence has {got} tokens, where latents and prompt are {expected}: another node adds some"


def _wan(model: Any, arguments: Arguments) -> LayoutOf:
    """Latents alone; frames to continue from lie behind them, a reference before them."""
    frames, height, width = arguments["x"].shape[2:]
    more = arguments.get("time_dim_concat")
    grid = _grid((frames + (0 if more is None else more.shape[2]), height, width), tuple(model.patch_size))
    reference = arguments.get("reference_latent")
    if reference is None or getattr(model, "ref_conv", None) is None:
        return _exactly(TokenLayout(grid, 0, grid[0] * grid[1] * grid[2]))
    before = LatentGrid(_grid((1, *reference.shape[-2:]), (1, *model.patch_size[1:])), 0)
    seq_len = before.tokens + grid[0] * grid[1] * grid[2]
    return _exactly(TokenLayout(grid, before.tokens, seq_len, (before,)))


def _ltx(model: Any, arguments: Arguments) -> LayoutOf:
    """Latents alone, each a token."""
    frames, height, width = arguments["x"].shape[2:]
    return _exactly(TokenLayout((frames, height, width), 0, frames * height * width))


def _hunyuan(model: Any, arguments: Arguments) -> LayoutOf:
    """Latents, behind them what the prompt is; a reference lies before them."""
    size, patch = tuple(arguments["x"].shape[2:]), tuple(model.patch_size)
    if len(patch) == 2:  # of images
        size, patch = (1, *size), (1, *patch)
    grid, references = _grid(size, patch), ()
    reference = arguments.get("ref_latent")
    if reference is not None:
        references = (LatentGrid(_grid(tuple(reference.shape[2:]), patch), 0),)
    start = sum(part.tokens for part in references)
    tokens = start + grid[0] * grid[1] * grid[2]

    def of(seq_len: int) -> TokenLayout | str:
        return _other(seq_len, tokens) if seq_len < tokens else TokenLayout(grid, start, seq_len, references)

    return of


def _flux(model: Any, arguments: Arguments) -> LayoutOf:
    """The prompt, the latents of the image, then those of images to edit."""
    patch = (1, model.patch_size, model.patch_size)
    start: int = arguments["context"].shape[1]
    grid = _grid((1, *arguments["x"].shape[2:]), patch)
    end, references = start + grid[1] * grid[2], []
    for reference in arguments.get("ref_latents") or ():
        references.append(LatentGrid(_grid((1, *reference.shape[-2:]), patch), end))
        end = references[-1].stop
    return _exactly(TokenLayout(grid, start, end, tuple(references)))


_WAN = Model((("blocks", "self_attn"), ("vace_blocks", "self_attn")), _wan)
MODELS: dict[str, Model] = {
    "WanModel": _WAN,
    "VaceWanModel": _WAN,
    "CameraWanModel": _WAN,
    "HunyuanVideo": Model((("double_blocks", ""), ("single_blocks", "")), _hunyuan),
    "LTXVModel": Model((("transformer_blocks", "attn1"),), _ltx),
    "Flux": Model((("double_blocks", ""), ("single_blocks", "")), _flux, min_tokens=4096),
}
"""By the name of ComfyUI's class."""


def model_of(diffusion_model: nn.Module) -> Model:
    """What is known of a model.

    Raises:
        ValueError: it is of no known class.
    """
    name = type(diffusion_model).__name__
    if name not in MODELS:
        raise ValueError(f"dit_accel knows no {name} of ComfyUI; known are {', '.join(MODELS)}.")
    return MODELS[name]


def key_mask(mask: torch.Tensor | None, batch: int, seq_len: int) -> torch.Tensor | None:
    """A mask of ComfyUI that only hides keys as bool (B, S), True where a key is seen; any other mask as it is.

    ComfyUI adds masks to the logits: 0 where a key is seen, the least number of the dtype, or one near it, where it is
    hidden. Waits for the device.
    """
    if mask is None:
        return None
    of_keys = mask.shape[-1] == seq_len and (mask.ndim < 2 or mask.shape[-2] == 1)
    of_keys = of_keys and mask.ndim <= 4 and all(length in (1, batch) for length in mask.shape[:-2])
    if not of_keys or (mask.ndim == 4 and mask.shape[1] != 1):
        return mask
    keys = mask.reshape(-1, seq_len)
    if mask.dtype != torch.bool:
        seen = keys == 0
        if not bool((seen | (keys < torch.finfo(mask.dtype).min / 2)).all()):
            return mask  # it weighs keys
        keys = seen
    return keys.expand(batch, seq_len)
