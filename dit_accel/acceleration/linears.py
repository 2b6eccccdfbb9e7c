"""Linear layers in 8 bits, by torchao: weights rounded once, activations at each call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..kernels.common.capability import compute_capability
from ..patches.targets import repeated_blocks, transformers_of

FORMATS = ("fp8", "int8")
# The matrix units take rows of so many values.
MULTIPLE = 16
# Below this width rounding takes as long as the product saves.
LEAST_WIDTH = 512
# Parts of a path that say: this layer sees one vector a sample, not the tokens, and scales all that follows.
MODULATION = ("norm", "mod", "adaln", "time", "gate")


def quantize_linears(pipe: Any, kind: str, least_width: int = LEAST_WIDTH) -> tuple[Callable[[], None], str]:
    """Run the token-wise linear layers of every transformer block in 8 bits.

    Weights are rounded per output channel and activations per token (LLM.int8, Dettmers et al. 2022; FP8 formats,
    Micikevicius et al. 2022). Embeddings, modulation and the last projection stay as they are: they cost little, and
    their errors reach every token.

    Args:
        pipe: a pipeline, or one transformer.
        kind: one of :data:`FORMATS`.
        least_width: layers with fewer inputs or outputs stay as they are.

    Returns:
        The undo, after which every weight is the same to the bit, and a sentence for the summary.

    Raises:
        ValueError: an unknown kind, no torchao, or a device that has no such product.
    """
    refuse_format(kind)
    models = [model for _, model, _ in transformers_of(pipe)]
    for model in models:
        _refuse_device(kind, next(model.parameters()).device)
    from torchao.quantization import quantize_

    left: Counter[str] = Counter()
    rounded: list[tuple[nn.Linear, torch.Tensor]] = []
    for model in models:
        for path, layer in _linears_of_blocks(model):
            reason = _why_not(path, layer, kind, least_width)
            if reason is not None:
                left[reason] += 1
                continue
            weight = layer.weight
            quantize_(layer, _config(kind))
            # The device holds the rounded weight alone. The parameter stays the object that it was.
            weight.data = weight.data.cpu()
            rounded.append((layer, weight))

    def undo() -> None:
        for layer, weight in rounded:
            weight.data = weight.data.to(layer.weight.device)
            layer.weight = weight
        rounded.clear()

    others = "".join(f"; {count} as they were: {reason}" for reason, count in left.items())
    return undo, f"linear layers: {len(rounded)} in {kind}{others}"


def refuse_format(kind: str, device: torch.device | None = None) -> None:
    """Raise a ValueError where :func:`quantize_linears` would, whatever the pipeline.

    Args:
        device: that its transformers will be on; None where it is not known yet.
    """
    if kind not in FORMATS:
        raise ValueError(f"linear must be one of {', '.join(FORMATS)}, or None, got {kind!r}.")
    if find_spec("torchao") is None:
        raise ValueError(f"linear={kind!r} needs torchao, which is not installed: pip install 'dit-accel[compile]'.")
    if device is not None:
        _refuse_device(kind, device)


def _linears_of_blocks(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    blocks = repeated_blocks(model)
    inside = {id(module) for block in blocks for module in block.modules()}
    return [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear and id(module) in inside and "dit_accel" not in path.split(".")
    ]


def _why_not(path: str, layer: nn.Linear, kind: str, least_width: int) -> str | None:
    """Why a layer stays as it is, or None."""
    if any(part.startswith(MODULATION) or part.endswith(MODULATION) for part in path.lower().split(".")):
        return "modulation"
    rows, columns = layer.weight.shape
    if min(rows, columns) < least_width:
        return f"narrower than {least_width}"
    if rows % MULTIPLE or columns % MULTIPLE:
        return f"no multiple of {MULTIPLE} wide"
    if kind == "fp8" and layer.weight.dtype != torch.bfloat16:
        return f"{str(layer.weight.dtype).removeprefix('torch.')}, where FP8 per token takes bfloat16"
    if not layer.weight.dtype.is_floating_point or type(layer.weight) is not nn.Parameter:
        return "in few bits already"
    return None


def _config(kind: str) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
    )

    if kind == "fp8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def _refuse_device(kind: str, device: torch.device) -> None:
    """Raise a ValueError where a device has no FP8 product."""
    if kind != "fp8":
        return
    if device.type == "cuda" and compute_capability(device.index or 0) < (8, 9):
        major, minor = compute_capability(device.index or 0)
        raise ValueError(f"linear='fp8' needs compute capability 8.9 or newer, got {major}.{minor}; int8 runs here.")
    # Offloaded weights wait on the CPU for a GPU.
    if device.type == "cpu" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ValueError(
            "linear='fp8' needs a GPU of compute capability 8.9 or newer, got a CPU alone; int8 runs here."
        )
