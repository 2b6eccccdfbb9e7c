"""Which implementation of an operation runs a call, and why: one vocabulary for every operation.

``"triton"`` names our kernels, ``"torch"`` plain torch code, ``"reference"`` the plainest torch code that an operation
has, ``"fa4"`` flash-attn-4, which knows block-sparse attention alone. A name is honoured or refused; ``"auto"`` takes
the best, and so does every operation but attention under ``"fa4"``. A predicate ``why_not_x(case) -> str | None`` says
why an operation's kernels cannot run a case; it serves the automatic choice and the refusal of a name alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    from ..mask.block_mask import BlockMask

BACKENDS = ("auto", "triton", "torch", "reference", "fa4")

Operation = Literal[
    "attention",
    "search_attention",
    "dense_attention",
    "quantized_attention",
    "selection",
    "gate",
    "block_mass",
    "linear_branch",
    "coarse",
    "clipped_softmax",
    "pyramid",
    "rectified",
    "residual",
    "agents",
]

BY_NAME = "asked for by name"
FASTEST = "the fastest that runs here"
INTERPRETER = "the interpreter is for tests, ask for it by name"


class Choice(NamedTuple):
    """A backend and why it was chosen; for an automatic choice that is why faster ones were passed over."""

    name: str
    reason: str


class Case(NamedTuple):
    """What a choice looks at. What is None is not known yet, and no reason to refuse.

    Attributes:
        blocks: tokens in a query and in a key block.
        recorded: whether gradients are asked for.
        permuted, hidden, token_bits: whether the call has ``rows``, a key mask, and blocks masked by token.
    """

    device: torch.device
    dtype: torch.dtype | None = None
    head_dim: int | None = None
    blocks: tuple[int, int] | None = None
    recorded: bool = False
    permuted: bool = False
    hidden: bool = False
    token_bits: bool = False


def case_of(
    *tensors: torch.Tensor,
    mask: BlockMask | None = None,
    blocks: tuple[int, int] | None = None,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> Case:
    """The case of a call with these tensors ``[B, S, H, D]``."""
    first, bits = tensors[0], False
    if mask is not None:
        blocks = (mask.block_q, mask.block_k)
        bits = mask.token_bits is not None and mask.token_bits.shape[0] > 0
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return Case(
        first.device, first.dtype, first.shape[-1], blocks, recorded, rows is not None, key_mask is not None, bits
    )


def check_backend(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is one of :data:`BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")


def refusal(operation: Operation, backend: str, reason: str) -> ValueError:
    """The error of a named backend that cannot run an operation."""
    return ValueError(f"Backend {backend!r} cannot run {spelled(operation)} here: {reason}.")


def spelled(operation: str) -> str:
    """An operation's name as words."""
    return operation.replace("_", " ")


def choose(
    operation: Operation, backend: str, case: Case, why_not: str | None, why_rather_torch: str | None = None
) -> Choice:
    """Choose between an operation's Triton kernels and its torch code.

    Args:
        backend: one of :data:`BACKENDS`.
        why_not: why the kernels cannot run the case, None if they can.
        why_rather_torch: why an automatic choice leaves the kernels alone although they can.

    Raises:
        ValueError: an unknown backend, or ``"triton"`` where the kernels cannot run the case.
    """
    check_backend(backend)
    if backend in ("torch", "reference"):
        return Choice(backend, BY_NAME)
    if backend == "triton":
        if why_not is not None:
            raise refusal(operation, backend, why_not)
        return Choice(backend, BY_NAME)
    reason = why_not or why_rather_torch
    if reason is None and case.device.type != "cuda":
        reason = INTERPRETER
    choice = Choice("triton", FASTEST) if reason is None else Choice("torch", f"triton: {reason}")
    return choice if backend == "auto" else Choice(choice.name, f"fa4 is for attention alone; {choice.reason}")
