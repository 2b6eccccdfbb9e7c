"""One patched transformer: its engine, its family, and where in the denoising run it is."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..engine import Engine
from ..layout import StepContext, TokenLayout
from .ambient import EAGER, LatentTokens
from .families import Family

# The opaque operator finds its session by id: a graph can hold a tensor, not a Python object.
_sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
_ids = itertools.count()


def session_of(session_id: int) -> Session | None:
    """The live session with this id, or None after its patch was removed."""
    return _sessions.get(session_id)


class Session:
    """State of one patched transformer.

    Args:
        engine: runs the attention calls.
        family: knows the model.
        patch_size: latent size of a token (frames, height, width).
        pipe: where the scheduler lives; None for a bare transformer.
    """

    def __init__(self, engine: Engine, family: Family, patch_size: tuple[int, int, int], pipe: Any) -> None:
        self.id = next(_ids)
        self.engine = engine
        self.family = family
        self.patch_size = patch_size
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._forward_id = 0
        self._last_layer = -1
        self._step: StepContext | None = None
        self._latents: dict[int, LatentTokens] = {}
        self._layouts: dict[tuple[LatentTokens, int], TokenLayout | str] = {}
        self._ids_grid: tuple[int, LatentTokens] | None = None
        self._sigmas: tuple[torch.Tensor, list[float]] | None = None
        _sessions[self.id] = self

    def begin_forward(self) -> None:
        """Called when an eager forward of the transformer starts."""
        self._forward_id += 1
        self._last_layer = -1

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None,
        scale: float | None,
        latents: LatentTokens | None,
        dense: Callable[[], torch.Tensor],
        record: bool = True,
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One intercepted call, (B, S, H, D); see :meth:`dit_accel.engine.Engine.attend`.

        ``latents`` is None in a compiled block whose transformer runs eagerly: its hook has published
        them. It is also None when a checkpointed forward is repeated for its gradients, hooks ended.
        """
        traced = latents is not None and latents is not EAGER.latents
        latents = latents or EAGER.latents or self._latents.get(q.shape[1])
        if latents is not None:
            self._latents[q.shape[1]] = latents
        if traced and record and layer <= self._last_layer:
            # The whole transformer is compiled: no hook announced this forward.
            self._forward_id += 1
        self._last_layer = layer
        layout = self._layout(latents, q.shape[1])
        if self._step is None or self._step.forward_id != self._forward_id:
            self._step = self._read_step()  # it does not change within a forward
        return self.engine.attend(layer, q, k, v, attn_mask, scale, layout, self._step, dense, record, learned)

    def _read_step(self) -> StepContext:
        """Where the pipeline is, read from its scheduler without a device sync."""
        pipe = None if self._pipe is None else self._pipe()
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or not getattr(scheduler, "num_inference_steps", None):
            return StepContext(branch=EAGER.branch, forward_id=self._forward_id)
        index = step_index(pipe, scheduler, timesteps)
        return StepContext(
            index=index,
            num_steps=len(timesteps),
            sigma=self._sigma(scheduler, index),
            branch=EAGER.branch,
            forward_id=self._forward_id,
        )

    def _sigma(self, scheduler: Any, index: int) -> float | None:
        schedule = scheduler.timesteps
        if self._sigmas is None or self._sigmas[0] is not schedule:
            self._sigmas = (schedule, sigmas_of(scheduler))  # once a run
        values = self._sigmas[1]
        return values[index] if index < len(values) else None

    def _layout(self, latents: LatentTokens | None, seq_len: int) -> TokenLayout | str:
        if latents is None:
            return "the latent grid is unknown"
        if latents.ids is not None:
            latents = self._resolve(latents)
        key = (latents, seq_len)
        if key not in self._layouts:
            self._layouts[key] = self._place(latents, seq_len)
        return self._layouts[key]

    def _place(self, latents: LatentTokens, seq_len: int) -> TokenLayout | str:
        extra = seq_len - latents.tokens
        if len(latents.grid) != 3 or extra < 0:
            return f"{seq_len} tokens do not hold the latent grid {latents.grid}"
        start = extra if self.family.text_first else 0
        return TokenLayout((latents.grid[0], latents.grid[1], latents.grid[2]), start, seq_len)

    def _resolve(self, latents: LatentTokens) -> LatentTokens:
        """Read the grid off position ids: one small copy to the host per forward."""
        if self._ids_grid is None or self._ids_grid[0] != self._forward_id:
            assert latents.ids is not None
            ids = latents.ids.detach().reshape(-1, latents.ids.shape[-1]).round().long().cpu()
            target = ids[ids[:, 0] == ids[0, 0]]  # references carry another first id
            height, width = (int(target[:, axis].max() - target[:, axis].min()) + 1 for axis in (1, 2))
            grid = (1, height, width) if height * width == len(target) else ()
            self._ids_grid = (self._forward_id, LatentTokens(grid, latents.tokens))
        return self._ids_grid[1]


def sigmas_of(scheduler: Any) -> list[float]:
    """Noise level of every step of a run, falling; empty for a scheduler that has none.

    Schedulers without sigmas but with the cumulative product of their alphas (DDIM and its kin) have
    ``sqrt((1 - alpha) / alpha)``, which is what diffusers' other schedulers make of the same betas; with a
    terminal signal of zero it is cut at 10,000.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor):
        return [float(sigma) for sigma in sigmas.tolist()]
    alphas, timesteps = getattr(scheduler, "alphas_cumprod", None), scheduler.timesteps
    if not isinstance(alphas, torch.Tensor) or timesteps.is_floating_point():
        return []
    signal = alphas.cpu().double()[timesteps.cpu()].clamp_min(1e-8)
    return [float(sigma) for sigma in ((1 - signal) / signal).sqrt().tolist()]


def step_index(pipe: Any, scheduler: Any, timesteps: torch.Tensor) -> int:
    """The denoising step that a pipeline is in."""
    if hasattr(scheduler, "step_index"):
        return scheduler.step_index or 0
    # DDIM-like schedulers keep no index, but the pipeline holds the timestep, a view into the schedule.
    current = getattr(pipe, "_current_timestep", None)
    if not isinstance(current, torch.Tensor):
        return 0
    if current.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr():
        return int(current.storage_offset() - timesteps.storage_offset())
    matches = (timesteps == current).nonzero()
    return int(matches[0]) if len(matches) else 0
