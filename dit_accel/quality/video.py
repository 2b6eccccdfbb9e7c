"""Clips as the metrics see them: ``[F, H, W, 3]`` in [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


def as_video(frames: Any, name: str = "video") -> torch.Tensor:
    """Check a clip and bring it to float32 ``[F, H, W, 3]`` in [0, 1] on the CPU.

    Args:
        frames: tensor or numpy array ``[F, H, W, 3]`` (an image is one frame), RGB, either uint8 in
            0..255 or floating point in [0, 1] as diffusers' ``output_type="np"`` and ``"pt"`` give it.
        name: what error messages call it.

    Raises:
        ValueError: another shape or dtype, no frames, or values outside [0, 1] (NaN included).
    """
    clip = torch.as_tensor(frames).detach().cpu()
    if clip.ndim != 4 or clip.shape[-1] != 3 or 0 in clip.shape:
        raise ValueError(f"{name} must be [frames, height, width, 3] with no empty side, got {list(clip.shape)}.")
    if clip.dtype == torch.uint8:
        return clip.float() / 255
    if not clip.dtype.is_floating_point:
        raise ValueError(f"{name} must be uint8 or floating point, got {clip.dtype}.")
    clip = clip.float()
    low, high = clip.aminmax()
    # Written so that NaN fails too.
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")
    return clip


def to_uint8(clip: torch.Tensor) -> torch.Tensor:
    """Round a float clip in [0, 1] to 8-bit levels, as a video encoder would get it."""
    return (clip * 255).round().to(torch.uint8)


@dataclass(frozen=True, eq=False)
class ClipPair:
    """The same prompt and seed twice: the dense clip and the accelerated one.

    Attributes:
        reference, candidate: ``[F, H, W, 3]``, anything :func:`as_video` takes; stored as float32 in [0, 1].
        fps: frames per second.
        reference_latents, candidate_latents: optional final latents before the VAE, any equal shape.
        known: what metrics found of the reference alone, by their own names; :meth:`beside` alone hands it on.
    """

    reference: torch.Tensor
    candidate: torch.Tensor
    fps: float = 16.0
    reference_latents: torch.Tensor | None = None
    candidate_latents: torch.Tensor | None = None
    known: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        is_itself = self.candidate is self.reference  # of a long clip two copies in floating point are 0.8 GB
        object.__setattr__(self, "reference", as_video(self.reference, "reference"))
        object.__setattr__(self, "candidate", self.reference if is_itself else as_video(self.candidate, "candidate"))
        if self.reference.shape != self.candidate.shape:
            raise ValueError(
                f"paired clips must have one shape, got {list(self.reference.shape)} and {list(self.candidate.shape)}."
            )
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}.")

    def beside(self, candidate: torch.Tensor, candidate_latents: torch.Tensor | None = None) -> ClipPair:
        """The same dense clip and another accelerated one; what is known of the dense clip is not found again.

        Args:
            candidate, candidate_latents: as for the pair itself.

        Raises:
            ValueError: the clips do not pair.
        """
        pair = replace(self, candidate=candidate, candidate_latents=candidate_latents)
        object.__setattr__(pair, "known", self.known)
        return pair
