"""Sparse attention as a diffusion attention backend of vllm-omni. Imports vllm-omni.

A layer has an object of its own, and a call may bring the latent grid. What vllm-omni does not say, the step and whose
request it is, a plan must do without: each call chooses anew.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata

from .. import presets
from ..layout import LatentGrid, TokenLayout
from ..patches.summary import PatchSummary
from ..runner import AttentionRunner
from ..stages.schedule import Schedule


class SparseBackend(AttentionBackend):
    """What vllm-omni chooses by name."""

    @staticmethod
    def get_name() -> str:
        return "DIT_ACCEL"

    @staticmethod
    def get_impl_cls() -> type[SparseImpl]:
        return SparseImpl

    @staticmethod
    def get_metadata_cls() -> type[Any]:
        found: type[Any] = AttentionMetadata
        return found

    @staticmethod
    def get_builder_cls() -> type[Any]:
        raise NotImplementedError("Diffusion layers make their metadata themselves.")

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return []  # any

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        del attention_spec
        return True


class SparseImpl(AttentionImpl):
    """Attention of one layer.

    Args:
        backend_kwargs: ``recipe`` (the name of a preset; "pooled"), ``backend`` (of every operation), ``min_tokens``
            (below which a call stays dense), and the preset's options, such as ``density``.
        others: of vllm-omni's layers, which this needs not.

    Raises:
        ValueError: an unknown recipe, option or backend, or a recipe that needs more than the calls of attention.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        del num_heads, head_size, num_kv_heads, qkv_layout, others
        options = dict(backend_kwargs or {})
        backend, self._least = options.pop("backend", "auto"), options.pop("min_tokens", 8192)
        recipe = presets.resolve(options.pop("recipe", "pooled"), **options)
        self._runner = AttentionRunner(
            replace(recipe, schedule=Schedule()), layers=[prefix or "attention"], backend=backend
        )
        self._scale, self._causal = softmax_scale, causal

    def summary(self) -> PatchSummary:
        """What this layer did so far. Waits for the device."""
        return self._runner.summary()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any = None
    ) -> torch.Tensor:
        """Attention (B, S, H, D) of a call on any platform."""
        mask = getattr(attn_metadata, "attn_mask", None)

        def dense() -> torch.Tensor:
            seen = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            shared = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                q, k, v, seen, is_causal=self._causal, scale=self._scale, enable_gqa=shared
            )
            return out.transpose(1, 2)

        if self._causal:
            return self._runner.pass_by(0, "causal attention", dense)
        layout = self._layout(getattr(attn_metadata, "video_layout", None), key.shape[1])
        with self._runner.run(), self._runner.forward(layout):
            return self._runner.attend(0, query, key, value, dense, attn_mask=mask, scale=self._scale)

    def _layout(self, told: Any, seq_len: int) -> TokenLayout | str:
        """Where the latents are in a sequence, or why that is not known."""
        if seq_len < self._least:
            return f"{seq_len} tokens, too few to gain (below {self._least})"
        grids = _grids(told)
        if not grids:
            return "the latent grid is unknown"
        if any(grid.stop > seq_len for grid in grids):
            return f"{seq_len} tokens do not hold the latent grid {grids[0].grid}"
        return TokenLayout(grids[0].grid, grids[0].start, seq_len, tuple(grids[1:]))


def _grids(told: Any) -> list[LatentGrid]:
    """What is generated first, then references, as a model of vllm-omni publishes them; empty where it does not."""
    if told is None:
        return []
    spans = getattr(told, "video_spans", ())
    if spans:
        found = [LatentGrid(tuple(span.latent_grid), span.start) for span in spans if span.role == "target"]
        references = [LatentGrid(tuple(span.latent_grid), span.start) for span in spans if span.role != "target"]
        return [*found, *references] if len(found) == 1 else []
    if told.latent_grid is None or told.prefix_len is None or not prod(told.latent_grid):
        return []
    return [LatentGrid(tuple(told.latent_grid), told.prefix_len)]
