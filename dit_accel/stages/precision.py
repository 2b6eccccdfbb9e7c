"""In what numbers the products are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ..call import AttentionCall
from ..kernels import choose_backend, quantized_block_sparse_attention
from ..kernels.attention.api import attend_by, choose_attention, validate, why_not_at_once
from ..kernels.attention.means import LeftOutMeans
from ..kernels.attention.variants import kernel_of, why_not_hopper_quantized
from ..kernels.common.choice import Case, Choice, Operation, case_of
from ..kernels.common.quantized_inputs import INTEGER_VALUES, KEY_SCALES, validate_rotation
from ..kernels.quantized.api import choose_quantized, why_not_quantized
from ..plan import AttentionPlan
from .compensate.protocol import Compensation
from .select.protocol import Select

Attended = tuple[torch.Tensor, torch.Tensor]
"""Output (B, S, H, D), and a tensor with a NaN wherever the output has one."""


class Precision(Protocol):
    """The numbers of a sparse call. Calls that a schedule leaves dense run in the model's own.

    A kind inherits from this class, and says where it differs from what stands here.

    Attributes:
        operation: what attention in these numbers is called where backends are recorded.
    """

    operation: ClassVar[Operation]

    def conflicts_with(self, _select: Select, _compensate: Compensation) -> str | None:
        """A sentence that says why these stages have no attention in these numbers; None where they have."""
        return None

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backend of attention for a case, see :meth:`dit_accel.stages.select.protocol.Select.choices`."""
        ...

    def choose(self, call: AttentionCall, plan: AttentionPlan, backend: str) -> Choice:
        """The backend of a call under a plan; the reason also names the kernel.

        Raises:
            ValueError: no backend, or not the named one, can run the call in these numbers.
        """
        ...

    def why_not_means(
        self, _call: AttentionCall, _plan: AttentionPlan, _backend: str, _means: LeftOutMeans
    ) -> str | None:
        """Why :meth:`attend` cannot take means of left-out blocks, which a launch of its own goes on over then; None if
        it can."""
        return "in these numbers no kernel does"

    def attend(
        self,
        call: AttentionCall,
        plan: AttentionPlan,
        backend: str,
        with_lse: bool = False,
        means: LeftOutMeans | None = None,
    ) -> Attended:
        """Attention over the kept blocks by the backend that :meth:`choose` gave; ``with_lse`` makes the second tensor
        the log-sum-exp ``[B, H, S]``. Both are over ``means`` too, where :meth:`why_not_means` found nothing."""
        ...


@dataclass(frozen=True)
class ModelDtype(Precision):
    """The model's own dtype, with float32 accumulation."""

    operation: ClassVar[Operation] = "attention"

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """Block-sparse attention."""
        return {"attention": choose_attention(case, backend)}

    def choose(self, call: AttentionCall, plan: AttentionPlan, backend: str) -> Choice:
        """See :func:`~dit_accel.kernels.choose_backend`."""
        return choose_backend(
            call.q, call.k, call.v, plan.mask, rows=plan.rows, key_mask=call.key_mask, backend=backend
        )

    def why_not_means(self, call: AttentionCall, plan: AttentionPlan, backend: str, means: LeftOutMeans) -> str | None:
        """See :func:`~dit_accel.kernels.attention.api.why_not_at_once`."""
        return why_not_at_once(
            backend, call.q, call.k, call.v, plan.mask, means, rows=plan.rows, key_mask=call.key_mask
        )

    def attend(
        self,
        call: AttentionCall,
        plan: AttentionPlan,
        backend: str,
        with_lse: bool = False,
        means: LeftOutMeans | None = None,
    ) -> Attended:
        """Block-sparse attention with gradients."""
        mask, rows, key_mask = plan.mask, plan.rows, call.key_mask
        validate(call.q, call.k, call.v, mask, rows, key_mask)
        out, lse = attend_by(
            backend,
            call.q,
            call.k,
            call.v,
            mask,
            rows=rows,
            key_mask=key_mask,
            scale=call.scale,
            return_lse=with_lse,
            means=means,
        )
        # Where the kernel has the log-sum-exp at hand it shows a NaN at a hundredth of the bytes.
        return out, out if lse is None or not (with_lse or backend in ("triton", "fa4")) else lse


@dataclass(frozen=True)
class Int8(Precision):
    """INT8 queries and keys, values in the model's dtype: SageAttention (arXiv 2410.02367).

    Gradients go straight through the rounding: those of attention at the rounded numbers, in the model's dtype.

    A scale for each query token and each key block (or finer). On a GPU the kernels need Triton; where they
    cannot run a call, the call raises and says why. Without a GPU the same numbers are computed in float32: that
    shows what they cost in fidelity, and is no faster.

    Attributes:
        smooth_k: subtract the mean key, which changes no softmax and takes the keys' common offset away.
        smooth_q: subtract each query block's mean too, and add its share of the logits back in float32
            (SageAttention2, arXiv 2411.10958).
        key_scales: ``"block"``, or ``"thread"``: four scales a key block, for the keys that one thread of the
            matrix unit holds (SageAttention2's per-thread quantisation).
        rotate: turn queries and keys by a Hadamard matrix first, which spreads channels that stand out over all (as
            QuaRot, arXiv 2404.00456); for head dims 16, 32, 64 and 128, and without ``smooth_q``.
    """

    smooth_k: bool = True
    smooth_q: bool = False
    key_scales: str = "block"
    rotate: bool = False
    operation: ClassVar[Operation] = "quantized_attention"
    _kernel: ClassVar[str] = "int8"

    def __post_init__(self) -> None:
        if self.key_scales not in KEY_SCALES:
            raise ValueError(f"key_scales must be one of {', '.join(KEY_SCALES)}, got {self.key_scales!r}.")
        if self.rotate and self.smooth_q:
            raise ValueError("precision.rotate and precision.smooth_q both spread out queries: give one of them.")

    def conflicts_with(self, select: Select, compensate: Compensation) -> str | None:
        if compensate.attends_alone:
            return (
                f"{type(compensate).__name__} has kernels of its own, in the model's dtype, and does not go "
                f"with precision {type(self).__name__}."
            )
        if select.is_dense:
            return (
                f"Precision {type(self).__name__} acts on this package's kernels, and a dense selection "
                "runs the model's own; use select 'full' to read every block in these numbers."
            )
        return None

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """Quantised attention; an automatic choice does not leave a GPU's kernels for the emulation.

        Raises:
            ValueError: heads cannot be rotated, or the kernels, meant by name or by a GPU, cannot run the case.
        """
        if case.head_dim is not None:
            validate_rotation(self.rotate, self.smooth_q, case.head_dim)
        if backend == "auto" and case.device.type == "cuda" and self._kernel not in INTEGER_VALUES:
            reason = why_not_quantized(case, self._kernel)
            if reason is not None:
                raise ValueError(
                    f"precision {self._kernel!r} cannot run this call: {reason}; use precision 'model', or backend "
                    "'torch' to emulate it."
                )
        return {"quantized_attention": choose_quantized(case, self._kernel, backend)}

    def choose(self, call: AttentionCall, plan: AttentionPlan, backend: str) -> Choice:
        """See :meth:`choices`."""
        case = case_of(call.q, call.k, call.v, mask=plan.mask, rows=plan.rows, key_mask=call.key_mask)
        choice = self.choices(case, backend)["quantized_attention"]
        if choice.name != "triton":
            return choice
        return kernel_of(choice, why_not_hopper_quantized(call.q, plan.mask, self.smooth_q))

    def attend(
        self,
        call: AttentionCall,
        plan: AttentionPlan,
        backend: str,
        _with_lse: bool = False,
        _means: LeftOutMeans | None = None,
    ) -> Attended:
        """Quantised block-sparse attention, with gradients straight through the rounding.

        Raises:
            ValueError: gradients around a ring, whose parts are put together by their log-sum-exp, which has none.
        """
        if call.ring is not None and torch.is_grad_enabled() and call.q.requires_grad:
            raise ValueError(f"precision {self._kernel!r} has no gradients around a ring; use precision 'model'.")
        result = quantized_block_sparse_attention(
            call.q,
            call.k,
            call.v,
            plan.mask,
            precision=self._kernel,
            rows=plan.rows,
            key_mask=call.key_mask,
            scale=call.scale,
            smooth_k=self.smooth_k,
            smooth_q=self.smooth_q,
            key_scales=self.key_scales,
            rotate=self.rotate,
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
