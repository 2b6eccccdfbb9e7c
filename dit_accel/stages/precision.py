"""In what numbers the products are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ..kernels import BlockMask, block_sparse_attention, choose_backend, quantized_block_sparse_attention
from ..kernels.quantize import KEY_SCALES
from ..kernels.quantized import why_not_quantized

Attended = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D), and a tensor with a NaN wherever the output has one."""


class Precision(Protocol):
    """The numbers of a sparse call. Calls that a schedule leaves dense run in the model's own."""

    is_quantized: ClassVar[bool]

    def choose_backend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        backend: str,
    ) -> tuple[str, str]:
        """The backend of a call and why.

        Raises:
            RuntimeError: no backend, or not the named one, can run the call in these numbers.
        """
        ...

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        scale: float | None,
        backend: str,
        with_lse: bool = False,
    ) -> Attended:
        """Attention over the kept blocks of (B, S, H, D) tensors; ``with_lse`` makes the second one the
        log-sum-exp ``[B, H, S]``."""
        ...


@dataclass(frozen=True)
class ModelDtype:
    """The model's own dtype, with float32 accumulation."""

    is_quantized: ClassVar[bool] = False

    def choose_backend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        backend: str,
    ) -> tuple[str, str]:
        """See :func:`~dit_accel.kernels.choose_backend`."""
        return choose_backend(q, k, v, mask, rows=rows, key_mask=key_mask, backend=backend)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        scale: float | None,
        backend: str,
        with_lse: bool = False,
    ) -> Attended:
        """Block-sparse attention with gradients."""
        result = block_sparse_attention(
            q,
            k,
            v,
            mask,
            rows=rows,
            key_mask=key_mask,
            scale=scale,
            # Where the kernel has the log-sum-exp at hand it shows a NaN at a hundredth of the bytes.
            return_lse=with_lse or backend in ("triton", "fa4"),
            backend=backend,
        )
        return result if isinstance(result, tuple) else (result, result)


@dataclass(frozen=True)
class Int8:
    """INT8 queries and keys, values in the model's dtype: SageAttention (arXiv 2410.02367). Inference only.

    A scale for each query token and each key block (or finer). On a GPU the kernels need Triton; where they
    cannot run a call, the call raises and says why. Without a GPU the same numbers are computed in float32: that
    shows what they cost in fidelity, and is no faster.

    Attributes:
        smooth_k: subtract the mean key, which changes no softmax and takes the keys' common offset away.
        smooth_q: subtract each query block's mean too, and add its share of the logits back in float32
            (SageAttention2, arXiv 2411.10958).
        key_scales: ``"block"``, or ``"thread"``: four scales a key block, for the keys that one thread of the
            matrix unit holds (SageAttention2's per-thread quantisation).
    """

    smooth_k: bool = True
    smooth_q: bool = False
    key_scales: str = "block"
    is_quantized: ClassVar[bool] = True
    _kernel: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.key_scales not in KEY_SCALES:
            raise ValueError(f"key_scales must be one of {', '.join(KEY_SCALES)}, got {self.key_scales!r}.")

    def choose_backend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        backend: str,
    ) -> tuple[str, str]:
        """Triton on a GPU, or the named backend."""
        reason = why_not_quantized(q, mask, self._kernel)
        if any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled():
            reason = "8-bit attention has no gradient"
        elif backend in ("torch", "reference"):
            return backend, f"asked for by name; {self._kernel} emulated in float32"
        elif reason is None and (backend == "triton" or q.is_cuda):
            return "triton", "asked for by name" if backend == "triton" else "the fastest that runs here"
        elif backend == "auto" and not q.is_cuda:
            return "torch", f"{self._kernel} emulated in float32, no faster: there are no 8-bit kernels for a CPU"
        elif reason is None:
            reason = f"backend {backend!r} has no 8-bit kernels"
        raise RuntimeError(
            f"precision {self._kernel!r} cannot run this call: {reason}. Use precision 'model', or a backend of "
            "'torch' to emulate it."
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        scale: float | None,
        backend: str,
        with_lse: bool = False,
    ) -> Attended:
        """Quantised block-sparse attention; no gradients."""
        result = quantized_block_sparse_attention(
            q,
            k,
            v,
            mask,
            precision=self._kernel,
            rows=rows,
            key_mask=key_mask,
            scale=scale,
            smooth_k=self.smooth_k,
            smooth_q=self.smooth_q,
            key_scales=self.key_scales,
            return_lse=True,
            backend=backend,
        )
        assert isinstance(result, tuple)
        return result


@dataclass(frozen=True)
class Int8Fp8(Int8):
    """:class:`Int8` with attention weights and values in FP8 (e4m3), a scale per channel: SageAttention2
    (arXiv 2411.10958). FP8 needs a GPU of compute capability 8.9 or newer."""

    _kernel: ClassVar[str] = "int8_fp8"


@dataclass(frozen=True)
class Int8Int8(Int8):
    """:class:`Int8` with INT8 weights, a scale per block pair, and INT8 values: PAROAttention (arXiv 2506.16054).

    For fidelity only: no kernel, the numbers are computed exactly in float32 on any device.
    """

    _kernel: ClassVar[str] = "int8_int8"

    def choose_backend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: BlockMask,
        rows: torch.Tensor | None,
        key_mask: torch.Tensor | None,
        backend: str,
    ) -> tuple[str, str]:
        """The emulation, unless a kernel was asked for by name."""
        if backend == "auto" and not any(x.requires_grad for x in (q, k, v)):
            return "torch", f"{self._kernel} emulated in float32, no faster: it has no kernel"
        return super().choose_backend(q, k, v, mask, rows, key_mask, backend)


@dataclass(frozen=True)
class Int8Int4(Int8Int8):
    """:class:`Int8Int8` with INT4 values, for which Hopper has no matrix unit."""

    _kernel: ClassVar[str] = "int8_int4"


PRECISIONS: dict[str, type[Precision]] = {
    "model": ModelDtype,
    "int8": Int8,
    "int8_fp8": Int8Fp8,
    "int8_int8": Int8Int8,
    "int8_int4": Int8Int4,
}
