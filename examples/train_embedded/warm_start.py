"""Weights of one transformer as the start of another of the same width: other patches, other heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

ATTENTION = ("attn1.to_q.", "attn1.to_k.", "attn1.norm_q.", "attn1.norm_k.")


def fitted(value: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """A parameter as one of another patch size needs it; itself where nothing changes.

    A larger patch embeds the mean of its latents, and predicts for each of them what it predicted for one.

    Raises:
        ValueError: the two differ in more than the patch.
    """
    if value.shape == like.shape:
        return value
    if name.endswith("patch_embedding.weight") and value.shape == (*like.shape[:2], 1, 1, 1):
        return (value / like[0, 0].numel()).expand_as(like)
    if name.endswith(("proj_out.weight", "proj_out.bias")) and like.shape[0] % value.shape[0] == 0:
        return value.repeat(like.shape[0] // value.shape[0], *[1] * (value.dim() - 1))
    raise ValueError(f"{name} is {list(value.shape)} there and {list(like.shape)} here: widths must be the same.")


def fitted_all(
    values: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor], fresh_attention: bool
) -> dict[str, torch.Tensor]:
    """The start of every parameter of `like`.

    Args:
        fresh_attention: leave queries and keys of the self-attentions as they were drawn. What a model attends to is
            then of its own training, also where the other one was trained to concentrate.
    """
    start = {}
    for name, parameter in like.items():
        own = fresh_attention and any(part in name for part in ATTENTION)
        start[name] = parameter.detach().clone() if own else fitted(values[name].to(parameter), parameter, name)
    return start
