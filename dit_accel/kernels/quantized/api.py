"""Public quantised block-sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..attention.api import block_sparse_attention, validate
from ..common import capability
from ..common.choice import Case, Choice, case_of, choose, refusal
from ..common.quantized_inputs import INTEGER_VALUES, PRECISIONS, QuantizedInputs, reference_quantize
from ..common.scale import scale_of
from ..mask.block_mask import BlockMask
from .integer_weights import integer_weight_attention
from .straight_through import rounded_inputs, straight_through


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
    key_scales: str = "block",
    rotate: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    quantized: QuantizedInputs | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`~dit_accel.kernels.block_sparse_attention` in 8-bit arithmetic.

    Gradients go straight through the rounding: they are those of full-precision attention at the rounded queries, keys
    and values, by its own backward. The log-sum-exp has none.

    INT8 queries (a scale per token) and keys (a scale per block or finer) after subtracting the mean key, as
    SageAttention (arXiv 2410.02367, 2411.10958); the log-sum-exp is corrected for the subtraction.

    Args:
        precision: ``"int8"`` keeps values and weights in the input dtype; ``"int8_fp8"`` has both in e4m3;
            ``"int8_int8"`` and ``"int8_int4"`` have INT8 weights, a scale per block pair, and integer values of
            8 or 4 bits (PAROAttention, arXiv 2506.16054), for their numbers only: they have no kernel, and are
            computed exactly in float32 wherever the backend would have been.
        smooth_k: subtract the mean key, which removes channel offsets at no loss.
        smooth_q: subtract each query block's mean too; its share of the logits is added back in float32.
        key_scales: ``"block"``, or ``"thread"`` for four scales a block, one for the keys that each of four
            neighbouring threads of the matrix unit holds (SageAttention 2; see
            :mod:`~dit_accel.kernels.common.quantized_inputs`): outlier keys coarsen a quarter of their block.
        rotate: turn queries and keys by a Hadamard matrix before they are quantised, which changes no product and
            spreads channels that stand out over all; for head dims 16, 32, 64 and 128, without ``smooth_q``.
        backend: ``"triton"``, or the same quantised numbers in float32 on ``"torch"`` (any device, no faster
            than ``block_sparse_attention``) or ``"reference"`` (quadratic); ``"auto"``: the first that runs.
        quantized: what :func:`quantize_inputs` made of the same q, k, v, rows and block sizes, to reuse it.

    Other arguments, results and errors are those of ``block_sparse_attention``. ``scale`` must be positive.
    """
    validate(q, k, v, mask, rows, key_mask)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    scale = float(scale_of(q, scale))
    if not scale > 0:
        raise ValueError(f"scale must be positive for quantised attention, got {scale}.")
    backend = choose_quantized(case_of(q, k, v, mask=mask), precision, backend).name
    if quantized is None:
        with torch.no_grad():
            quantized = _prologue(backend)(
                q,
                k,
                v,
                mask.block_q,
                mask.block_k,
                precision=precision,
                rows=rows,
                smooth_k=smooth_k,
                smooth_q=smooth_q,
                key_scales=key_scales,
                rotate=rotate,
            )
    made = quantized

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        if backend == "triton":
            return _run_triton(q, k, v, mask, rows, key_mask, scale, made)
        if precision in INTEGER_VALUES:
            out, lse = integer_weight_attention(made, mask, rows, key_mask, scale)
        else:
            out, lse = _emulate(made, mask, rows, key_mask, scale, backend)
        return out.to(q.dtype), lse

    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        plain = partial(
            block_sparse_attention,
            mask=mask,
            rows=rows,
            key_mask=key_mask,
            scale=scale,
            backend="auto" if backend == "triton" else backend,
        )
        out, lse = straight_through(q, k, v, run, partial(rounded_inputs, made, mask, rows, rotate), plain)
    else:
        with torch.no_grad():
            out, lse = run()
    return (out, lse) if return_lse else out


def quantize_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    precision: str = "int8",
    rows: torch.Tensor | None = None,
    smooth_k: bool = True,
    smooth_q: bool = False,
    key_scales: str = "block",
    rotate: bool = False,
    backend: str = "auto",
) -> QuantizedInputs:
    """Quantise ``[B, S, H, D]`` inputs once, for selection (block means) and attention alike.

    In Triton one fused pass (after one over k for its mean, and v for FP8 scales), else plain torch.
    Arguments are those of :func:`quantized_block_sparse_attention`; block sizes are the mask's.
    """
    case = case_of(q, k, v, blocks=(block_q, block_k))
    prologue = _prologue(choose_quantized(case, precision, backend).name)
    with torch.cuda.device_of(q):
        return prologue(
            q,
            k,
            v,
            block_q,
            block_k,
            precision=precision,
            rows=rows,
            smooth_k=smooth_k,
            smooth_q=smooth_q,
            key_scales=key_scales,
            rotate=rotate,
        )


def why_not_quantized(case: Case, precision: str) -> str | None:
    """Why the Triton kernels cannot run a quantised call, or None if they can."""
    if precision in INTEGER_VALUES:
        return "integer weights have no kernel, they are computed in float32 on the torch backend"
    reason = capability.why_not_triton(case)
    if reason is None and case.blocks is not None and min(case.blocks) < 32:
        reason = f"8-bit products need blocks of at least 32, got {case.blocks[0]}x{case.blocks[1]}"
    if reason is None and precision == "int8_fp8" and case.device.type == "cuda":
        major, minor = capability.compute_capability(case.device.index or 0)
        if capability.is_amd():
            reason = "FP8 is for NVIDIA's GPUs, whose format the values have"
        elif (major, minor) < (8, 9):
            reason = f"FP8 needs compute capability 8.9 or newer, got {major}.{minor}"
    return reason


def choose_quantized(case: Case, precision: str, backend: str = "auto") -> Choice:
    """The backend of :func:`quantized_block_sparse_attention`; raises a ValueError if it is refused."""
    if backend == "fa4":
        raise refusal("quantized_attention", backend, "flash-attn-4 has no 8-bit kernels with block lists")
    choice = choose("quantized_attention", backend, case, why_not_quantized(case, precision))
    if choice.name == "triton":
        return choice
    return Choice(choice.name, f"{precision} emulated in float32, no faster; {choice.reason}")


def _run_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    quantized: QuantizedInputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..attention.variants import why_not_hopper_quantized

    if why_not_hopper_quantized(q, mask, quantized.smooth_q) is None:
        from ..attention.hopper.forward import hopper_forward

        return hopper_forward(q, k, v, mask, rows, key_mask, scale, quantized=quantized)
    from .triton.forward import quantized_forward

    with torch.cuda.device_of(q):
        return quantized_forward(quantized, mask, rows, key_mask, scale, q.shape[2], q.dtype)


def _prologue(backend: str) -> Callable[..., QuantizedInputs]:
    if backend != "triton":
        return reference_quantize
    from .triton.prologue import quantize_inputs as quantize_by_kernel

    return quantize_by_kernel


def _emulate(
    quantized: QuantizedInputs,
    mask: BlockMask,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 attention of the dequantised inputs; unlike the kernels it does not round the weights."""
    q, k, v = rounded_inputs(quantized, mask, rows)
    shift = quantized.q_shift[:, :, : mask.q_len] * scale
    if rows is not None:
        shift = torch.empty_like(shift).scatter_(2, rows.long().expand(shift.shape), shift)
    out, lse = block_sparse_attention(
        q,
        k,
        v,
        mask,
        rows=rows,
        key_mask=key_mask,
        scale=scale,
        return_lse=True,
        backend=backend,
    )
    return out, lse + shift
