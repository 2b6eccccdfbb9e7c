"""What the quantising prologue writes, and the same numbers in plain torch as its oracle.

INT8 queries with one scale a token, INT8 keys with one scale a key block or a thread's keys of a block, after
subtracting the mean key (SageAttention, arXiv 2410.02367 and 2411.10958: softmax does not see a vector common to
all keys), FP8 (e4m3) values with one scale a channel.

**Scales by thread** (2411.10958, section 3.2) are the finest that cost a matrix unit's threads nothing: whatever a
thread holds of a row of scores shares one factor. In the accumulator of Hopper's ``m64n*k32`` (and of every
``m16n8`` before it) lane ``t`` of a warp holds rows ``t // 4`` and ``t // 4 + 8`` and, of every 8 columns, columns
``2 (t % 4)`` and the next. So the keys of a block fall into four groups, ``(n % 8) // 2``. The paper's queries
have a group for the rows of equal ``n % 8``; ours have a scale for every row, finer still for one more register.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

PRECISIONS = ("int8", "int8_fp8", "int8_int8", "int8_int4")
KEY_SCALES = ("block", "thread")
KEY_GROUPS = 4  # keys n of a block with equal (n % 8) // 2
# The mean key is that of some 64 tiles of 128 keys, evenly spread. Any vector common to all keys would do, the
# log-sum-exp accounts for it exactly; the mean of 8,192 keys is off by a hundredth of their spread.
KEY_TILE, KEY_TILES = 128, 64
INTEGER_VALUES = {"int8_int8": 127, "int8_int4": 7}  # the largest value
FP8_MAX = 448.0
ROTATED_DIMS = (16, 32, 64, 128)  # of twice as many the matrix does not fit shared memory beside a tile
# Position, inside a group of 16 keys, at which FP8 values of key n are stored. In this order the register
# layout of the scores is, without any exchange between threads, that of the 8-bit left operand of the
# second product on Hopper; a sum over keys does not mind its order.
KEY_PLACE = tuple((n & 4) * 2 + (n & 2) * 2 + (n & 8) // 4 + (n & 1) for n in range(16))


@dataclass(frozen=True, eq=False)
class QuantizedInputs:
    """Quantised q, k and v in (permuted) sequence order, the 8-bit ones padded with zeros to whole blocks.

    Attributes:
        q: int8 ``[B, H, nq * block_q, D]``; ``q_scale`` float32 ``[B, H, nq * block_q]``, one per token.
        k: int8 ``[B, H, nk * block_k, D]``; ``k_scale`` float32 ``[B, H, nk]``, one per block, or
            ``[B, H, nk, 4]``, for the keys ``n`` of a block with ``(n % 8) // 2`` of 0 to 3.
        v: ``[B, Skv, H, D]`` in the input dtype, the given tensor itself where nothing is permuted; or e4m3
            ``[B, H, D, nk * block_k]`` with the keys of every 16 in the order ``KEY_PLACE`` and ``v_scale``
            float32 ``[B, H, D]``; or integers in int8 ``[B, H, nk * block_k, D]`` and ``v_scale``
            ``[B, H, nk, D]``, one per key block and channel.
        q_mean, k_mean: float32 ``[B, H, nq, D]`` and ``[B, H, nk, D]``, block means over the real tokens of
            the inputs (before smoothing), which selection reads.
        q_shift: float32 ``[B, H, nq * block_q]``, ``q . mean(k)``: what smoothing took from every logit of
            the row, before the softmax scale; zero without smoothing.
        smooth_q: whether the block mean was taken from q before quantising. The kernel then adds
            ``q_mean . k`` of the dequantised keys back to the logits.
        half_sums: whether the kernel sums weights and values in float16, tile by tile; ``v`` is then float16.
            Values beyond 65,504 become infinite.
    """

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor | None
    q_mean: torch.Tensor
    k_mean: torch.Tensor
    q_shift: torch.Tensor
    smooth_q: bool
    half_sums: bool = False

    @property
    def scales_by_thread(self) -> bool:
        """Whether every group of keys in a block has a scale of its own."""
        return self.k_scale.dim() == 4


def reference_quantize(
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
) -> QuantizedInputs:
    """:class:`QuantizedInputs` of ``[B, S, H, D]`` inputs in plain torch, on any device."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    validate_key_scales(key_scales, block_k)
    validate_rotation(rotate, smooth_q, q.shape[-1])
    qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
    if rows is not None:
        index = rows.long().expand(qh.shape[:3])[..., None].expand_as(qh)
        qh, kh, vh = (x.gather(2, index) for x in (qh, kh, vh))
    qf, q_count = _blocks(qh.float(), block_q)
    kf, k_count = _blocks(kh.float(), block_k)
    q_mean, k_mean = qf.sum(3) / q_count, kf.sum(3) / k_count
    center = torch.zeros_like(k_mean[:, :, 0])
    if smooth_k:  # k itself, not in the order of rows
        seen = torch.arange(k.shape[1], device=k.device)
        seen = seen[seen // KEY_TILE % sampled_keys(k.shape[1])[0] == 0]
        center = k[:, seen].transpose(1, 2).float().mean(2)
    q_shift = (qf * center[:, :, None, None]).sum(-1).flatten(2)
    k_real = torch.arange(kf.shape[2] * block_k, device=k.device).view(-1, block_k) < k.shape[1]
    q_real = torch.arange(qf.shape[2] * block_q, device=q.device).view(-1, block_q) < q.shape[1]
    kf = (kf - center[:, :, None, None]) * k_real[..., None]
    if smooth_q:
        qf = (qf - q_mean[:, :, :, None]) * q_real[..., None]
    if rotate:
        turn = rotation(q.shape[-1]).to(q.device)
        qf, kf = qf @ turn, kf @ turn
    q_peak = qf.abs().amax(-1).clamp_min(1e-12)
    k_peak = kf.abs().amax(-1)
    k_peak = _thread_groups(k_peak).amax((-1, -3)) if key_scales == "thread" else k_peak.amax(-1)
    k_peak = k_peak.clamp_min(1e-12)
    q_scale, k_scale = q_peak / 127, k_peak / 127
    v_scale = None
    value = v if rows is None else vh.transpose(1, 2)
    if precision == "int8_fp8":
        value = F.pad(vh, (0, 0, 0, kf.shape[2] * block_k - vh.shape[2]))
        v_peak = value.float().abs().amax(2).clamp_min(1e-12)
        v_scale = v_peak / FP8_MAX
        scaled = (value.float() * _inverse(v_peak, FP8_MAX)[:, :, None]).transpose(2, 3)
        grouped = scaled.unflatten(-1, (-1, 16))
        place = torch.tensor(KEY_PLACE, device=v.device)
        value = torch.empty_like(grouped, memory_format=torch.contiguous_format)
        value[..., place] = grouped
        value = value.flatten(-2).to(torch.float8_e4m3fn)
    elif precision in INTEGER_VALUES:
        most = INTEGER_VALUES[precision]
        vf, _ = _blocks(vh.float(), block_k)
        v_peak = vf.abs().amax(3).clamp_min(1e-12)
        v_scale = v_peak / most
        value = (vf * _inverse(v_peak, most)[:, :, :, None]).round().to(torch.int8).flatten(2, 3)
    return QuantizedInputs(
        q=(qf * _inverse(q_peak)[..., None]).round().to(torch.int8).flatten(2, 3),
        q_scale=q_scale.flatten(2),
        k=(kf * _of_keys(_inverse(k_peak), block_k)).round().to(torch.int8).flatten(2, 3),
        k_scale=k_scale,
        v=value,
        v_scale=v_scale,
        q_mean=q_mean,
        k_mean=k_mean,
        q_shift=q_shift,
        smooth_q=smooth_q,
    )


def sampled_keys(kv_len: int) -> tuple[int, int]:
    """``(step, tokens)``: every ``step``-th tile of ``KEY_TILE`` keys is read for their mean, so many keys."""
    tiles = -(-kv_len // KEY_TILE)
    step = max(1, tiles // KEY_TILES)
    count = -(-tiles // step)
    short = tiles * KEY_TILE - kv_len if (tiles - 1) % step == 0 else 0
    return step, count * KEY_TILE - short


def validate_key_scales(key_scales: str, block_k: int) -> None:
    """Raise a ValueError unless keys in blocks of ``block_k`` can have such scales."""
    if key_scales not in KEY_SCALES:
        raise ValueError(f"key_scales must be one of {', '.join(KEY_SCALES)}, got {key_scales!r}.")
    if key_scales == "thread" and block_k % 8:
        raise ValueError(f"key_scales 'thread' needs block_k to be a multiple of 8, got {block_k}.")


def validate_rotation(rotate: bool, smooth_q: bool, dim: int) -> None:
    """Raise a ValueError unless queries and keys can be rotated before they are quantised."""
    if rotate and dim not in ROTATED_DIMS:
        raise ValueError(f"rotate needs a head dim of {', '.join(map(str, ROTATED_DIMS))}, got {dim}.")
    if rotate and smooth_q:
        raise ValueError("rotate and smooth_q both spread out what stands out in queries: give one of them.")


def rotation(dim: int) -> torch.Tensor:
    """Orthonormal Hadamard matrix, float32 ``[D, D]``; ``dim`` is a power of two.

    An entry's sign is the parity of the bits that row and column share (Sylvester). Turned by it, a channel that stands
    out is spread over all, and no product of a query and a key changes (QuaRot, arXiv 2404.00456).
    """
    place = torch.arange(dim)
    shared = place[:, None] & place
    for step in (16, 8, 4, 2, 1):
        shared = shared ^ (shared >> step)
    return (1.0 - 2.0 * (shared & 1)) * dim**-0.5


def _thread_groups(x: torch.Tensor) -> torch.Tensor:
    """A last dimension of keys as ``[keys / 8, 4, 2]``, the groups in the middle."""
    return x.unflatten(-1, (-1, KEY_GROUPS, 2))


def _of_keys(scale: torch.Tensor, block_k: int) -> torch.Tensor:
    """Scales ``[B, H, nk]`` or ``[B, H, nk, 4]`` of keys as ``[B, H, nk, 1 or block_k, 1]``."""
    if scale.dim() == 3:
        return scale[..., None, None]
    group = torch.arange(block_k, device=scale.device) % 8 // 2
    return scale[..., group][..., None]


def _inverse(peak: torch.Tensor, largest: float = 127) -> torch.Tensor:
    # A correctly rounded quotient, as in the kernel: ``127 / peak`` in torch is a reciprocal times 127.
    return torch.full_like(peak, largest) / peak


def _blocks(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, H, S, D]`` padded and cut to ``[B, H, n, block, D]``, and the real tokens a block ``[n, 1]``."""
    length = x.shape[2]
    count = -(-length // block)
    padded = F.pad(x, (0, 0, 0, count * block - length)).unflatten(2, (count, block))
    real = (length - torch.arange(count, device=x.device) * block).clamp_max(block)
    return padded, real[:, None].to(x.dtype)


def dequantize(quantized: QuantizedInputs, block_k: int) -> tuple[torch.Tensor, ...]:
    """float32 q, k, v ``[B, H, S, D]`` that the quantised kernels in effect multiply, 8-bit ones padded.

    k lacks the mean key, q its block mean when smoothed; add ``q_mean . k`` to the logits for the latter.
    """
    q = quantized.q.float() * quantized.q_scale[..., None]
    k = quantized.k.float().unflatten(2, (-1, block_k)) * _of_keys(quantized.k_scale, block_k)
    v = quantized.v.float()
    if quantized.v_scale is None:
        v = v.transpose(1, 2)
    elif quantized.v_scale.dim() == 4:
        v = (v.unflatten(2, (-1, block_k)) * quantized.v_scale[:, :, :, None]).flatten(2, 3)
    else:
        place = torch.tensor(KEY_PLACE, device=v.device)
        v = v.unflatten(-1, (-1, 16))[..., place].flatten(-2).transpose(2, 3)
        v = v * quantized.v_scale[:, :, None]
    return q, k.flatten(2, 3), v
