"""Public quantised block-sparse attention (inference only)."""

from __future__ import annotations

import math

import torch

from . import capability
from .block_mask import BlockMask
from .block_sparse import validate
from .quantize import PRECISIONS, QuantizedInputs, dequantize, reference_quantize


def quantized_block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    *,
    precision: str = "int8",
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    smooth_k: bool = True,
    smooth_q: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    quantized: QuantizedInputs | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`~dit_accel.kernels.block_sparse_attention` in 8-bit arithmetic; no gradients.

    INT8 queries (a scale per token) and keys (a scale per block) after subtracting the mean key, as
    SageAttention (arXiv 2410.02367, 2411.10958); the log-sum-exp is corrected for the subtraction.

    Args:
        precision: ``"int8"`` keeps values and weights in the input dtype; ``"int8_fp8"`` has both in e4m3.
        smooth_k: subtract the mean key, which removes channel offsets at no loss.
        smooth_q: subtract each query block's mean too; its share of the logits is added back in float32.
        backend: ``"auto"``, ``"triton"`` or ``"reference"`` (the same numbers in plain torch, quadratic).
        quantized: what :func:`quantize_inputs` made of the same q, k, v, rows and block sizes, to reuse it.

    Other arguments, results and errors are those of ``block_sparse_attention``. ``scale`` must be positive.
    """
    validate(q, k, v, mask, rows, key_mask)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not scale > 0:
        raise ValueError(f"scale must be positive for quantised attention, got {scale}.")
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be one of auto, triton, reference, got {backend!r}.")
    reason = why_not_quantized(q, mask, precision)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"Backend 'triton' cannot run this call: {reason}.")
    use_triton = backend == "triton" or (backend == "auto" and reason is None and q.is_cuda)
    with torch.no_grad():
        if use_triton:
            out, lse = _triton(q, k, v, mask, precision, rows, key_mask, scale, smooth_k, smooth_q, quantized)
        else:
            out, lse = _reference(
                q, k, v, mask, precision, rows, key_mask, scale, smooth_k, smooth_q, quantized
            )
    return (out, lse) if return_lse else out


def why_not_quantized(q: torch.Tensor, mask: BlockMask, precision: str) -> str | None:
    """Why the Triton kernels cannot run a quantised call, or None if they can."""
    reason = capability.why_not_triton(q, mask)
    if reason is None and (mask.block_q < 32 or mask.block_k < 32):
        reason = f"8-bit products need blocks of at least 32, got {mask.block_q}x{mask.block_k}"
    if reason is None and precision == "int8_fp8" and q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        if (major, minor) < (8, 9):
            reason = f"FP8 needs compute capability 8.9 or newer, got {major}.{minor}"
    return reason


def _triton(q, k, v, mask, precision, rows, key_mask, scale, smooth_k, smooth_q, quantized):
    from .triton_quantize import quantize_inputs
    from .triton_quantized import quantized_forward
    from .variants import why_not_hopper_quantized

    if quantized is None:
        quantized = quantize_inputs(
            q,
            k,
            v,
            mask.block_q,
            mask.block_k,
            precision=precision,
            rows=rows,
            smooth_k=smooth_k,
            smooth_q=smooth_q,
        )
    if why_not_hopper_quantized(q, mask, quantized) is None:
        from .hopper_forward import hopper_forward

        return hopper_forward(q, k, v, mask, rows, key_mask, scale, quantized=quantized)
    return quantized_forward(quantized, mask, rows, key_mask, scale, q.shape[2], q.dtype)


def _reference(q, k, v, mask, precision, rows, key_mask, scale, smooth_k, smooth_q, quantized):
    """Attention of the dequantised inputs; weights are not rounded."""
    if quantized is None:
        quantized = reference_quantize(
            q,
            k,
            v,
            mask.block_q,
            mask.block_k,
            precision=precision,
            rows=rows,
            smooth_k=smooth_k,
            smooth_q=smooth_q,
        )
    qf, kf, vf = dequantize(quantized, mask.block_q, mask.block_k)
    if quantized.smooth_q:
        qf = qf + quantized.q_mean.repeat_interleave(mask.block_q, 2)
    batch, _, heads, _ = q.shape
    qf, kf, vf = qf[:, :, : mask.q_len], kf[:, :, : mask.kv_len], vf[:, :, : mask.kv_len]
    visible = mask.to_tokens().expand(batch, heads, mask.q_len, mask.kv_len)
    if key_mask is not None:
        keys = key_mask[:, None].expand(batch, heads, -1)
        if rows is not None:
            keys = keys.gather(-1, rows.long().expand_as(keys))
        visible = visible & keys[:, :, None]
    scores = (qf @ kf.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    some = visible.any(-1, keepdim=True)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    out = torch.exp(scores - torch.where(some, lse, torch.zeros_like(lse))) @ vf
    lse = lse.squeeze(-1) + quantized.q_shift[:, :, : mask.q_len] * scale
    if rows is not None:
        index = rows.long().expand(batch, heads, mask.q_len)
        lse = torch.empty_like(lse).scatter_(2, index, lse)
        out = torch.empty_like(out).scatter_(2, index[..., None].expand_as(out), out)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse
