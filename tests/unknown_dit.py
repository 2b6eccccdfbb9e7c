"""A small diffusion transformer of no known family, as somebody else may have written it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

HEADS = 2


class PlainProcessor:
    def __call__(self, attn: Any, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        keys = x if context is None else context
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)) for layer, y in ((attn.q, x), (attn.k, keys), (attn.v, keys)))
        return attn.out(dispatch_attention_fn(q, k, v).flatten(2))


class PlainAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.processor = PlainProcessor()

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return self.processor(self, x, context)


class PlainBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = PlainAttention(dim), PlainAttention(dim)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.cross_attn(x, text)


class UnknownTransformer(ModelMixin, ConfigMixin):
    """Latents (B, C, F, H, W) or (B, C, H, W); with ``joint`` the prompt attends in the same sequence."""

    @register_to_config
    def __init__(self, in_channels: int = 4, patch_size: tuple[int, ...] = (1, 2, 2), joint: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels * 4, 16)
        self.blocks = nn.ModuleList([PlainBlock(16) for _ in range(2)])

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor) -> Any:
        x = hidden_states if hidden_states.ndim == 5 else hidden_states[:, :, None]
        x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)
        x = self.embed(x.flatten(4).flatten(1, 3))
        if self.config.joint:
            x = torch.cat([x, encoder_hidden_states], 1)
        for block in self.blocks:
            x = block(x, encoder_hidden_states)
        return x
