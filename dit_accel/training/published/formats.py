"""What a published checkpoint holds, told by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ...presets import resolve
from ...recipe import Recipe
from ..few_steps import FewSteps
from .names import diffusers_path, without_prefix

_GATE, _PROJECTION = "to_gate_compress", "proj_l"
# By suffix, which half of a LoRA's product a tensor is.
_LORA = {
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_A.default.weight": "A",
    ".lora_B.default.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_A": "A",
    ".lora_B": "B",
}
_ALPHAS = (".alpha", ".lora_alpha")
# What is added to a parameter, by the end of its name.
_ADDED = {".diff": ".weight", ".diff_b": ".bias", ".diff_m": ""}
# Of quantised layers: TurboDiffusion's Int8Linear, ComfyUI's and torchao's.
_QUANTISED = (".int8_weight", ".weight_scale", ".scale_weight", ".weight_scale_inv")
# rCM's four steps of TrigFlow times atan(80), 1.5, 1.4, 1.0 as rectified flow: sin / (sin + cos).
_RCM_STEPS = FewSteps((0.98765, 0.93378, 0.85290, 0.60898), renoise=True)


@dataclass(frozen=True, eq=False)
class Published:
    """A published checkpoint of one transformer, by diffusers' names.

    Attributes:
        format: its name, for messages.
        recipe: what its authors ran it with; None where it holds nothing sparse.
        learned: parameters of the recipe by attention path and name, such as ``blocks.0.attn1`` and ``weight``.
        weights: whole parameters of the model; empty for a LoRA.
        added: changes of parameters.
        lora: the two halves of each linear layer's product, scaled, by path: ``[r, in]`` and ``[out, r]``.
        steps: the steps that it was distilled to, where that is known.
    """

    format: str
    recipe: Recipe | None
    learned: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    added: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lora: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    steps: FewSteps | None = None


def read_published(tensors: Mapping[str, torch.Tensor], name: str) -> Published:
    """Tell a checkpoint's format by the names of its tensors, and sort them.

    Known are:

    - FastWan: VSA gates ``to_gate_compress`` of each block beside the model's weights
      (github.com/hao-ai-lab/FastVideo, ``fastvideo/models/dits/wanvideo.py``; densities and steps of its scripts).
    - SLA and TurboDiffusion: ``proj_l`` of each attention, alone or beside the model's weights
      (github.com/thu-ml/SLA, ``sparse_linear_attention/core.py``; github.com/thu-ml/TurboDiffusion,
      ``turbodiffusion/SLA/core.py`` and ``inference/``).
    - LoRAs, with changes of biases and norms (``diff``, ``diff_b``, ``diff_m``), distilled to few steps or for sparse
      attention (github.com/ModelTC/LightX2V, ``lightx2v/utils/lora_loader.py`` and ``configs/distill``).
    - A whole model distilled to few steps, such as rCM's (github.com/NVlabs/rcm), under Wan's own names.

    Args:
        tensors: by their names in the file.
        name: of the file or repository, for messages, and for the steps of LoRAs, which hold none.

    Raises:
        ValueError: no such format, a quantised one, or tensors that belong to none of its parts.
    """
    plain = {without_prefix(key): value for key, value in tensors.items()}
    odd = next((key for key in plain if key.endswith(_QUANTISED)), None)
    if odd is not None:
        raise ValueError(f"{name} is quantised ({odd}), give the checkpoint in half precision instead.")
    if any(key.endswith((*_LORA, *_ADDED)) for key in plain):
        return _lora(plain, name)
    learned: dict[str, dict[str, torch.Tensor]] = {}
    weights: dict[str, torch.Tensor] = {}
    kinds = set()
    for key, value in plain.items():
        path, _, leaf = key.rpartition(".")
        # A bare parameter's name is its path.
        full = f"{diffusers_path(path)}.{leaf}" if leaf in ("weight", "bias") else diffusers_path(key)
        module, _, kind = full.rpartition(".")[0].rpartition(".")
        if kind in (_GATE, _PROJECTION):
            learned.setdefault(module, {})[leaf] = value
            kinds.add(kind)
        else:
            weights[full] = value
    if len(kinds) > 1:
        raise ValueError(f"{name} holds both VSA gates and SLA projections, which no recipe here runs together.")
    if not kinds and not any(re.match(r"(transformer_)?blocks\.\d+\.", key) for key in weights):
        first = next(iter(tensors), "nothing")
        raise ValueError(f"{name} is of no known format: it holds {first}, and no block of a transformer.")
    make = _fastwan if _GATE in kinds else _sla if kinds else _dense
    return make(learned, weights, name)


def _fastwan(
    learned: Mapping[str, Mapping[str, torch.Tensor]], weights: Mapping[str, torch.Tensor], name: str
) -> Published:
    first = next(iter(learned.values()))
    if set(first) != {"weight", "bias"}:
        raise ValueError(
            f"{name} has VSA gates without a bias, as MiniMax-H3's, whose coarse branch covers text and sound too, "
            "which the recipe vsa does not."
        )
    # Of its scripts: sparsity 0.8 for 1.3B and 5B, 0.9 for 14B, 5,120 features wide.
    density = 0.1 if first["weight"].shape[0] >= 5120 else 0.2
    steps = FewSteps((1.0, 0.757, 0.522), renoise=True) if weights and "fastwan" in name.lower() else None
    return Published("FastWan (VSA)", resolve("vsa", density=density), learned, weights, steps=steps)


def _sla(
    learned: Mapping[str, Mapping[str, torch.Tensor]], weights: Mapping[str, torch.Tensor], name: str
) -> Published:
    turbo = "turbo" in name.lower()
    # TurboDiffusion's defaults: a tenth of the blocks of 128 queries and 64 keys; SLA's: blocks of 64.
    recipe = resolve("sla", density=0.1 if turbo else 0.05, form="all_tokens", block=(128, 64) if turbo else (64, 64))
    recipe = recipe.with_fields({"select.keep_own": False})
    steps = _RCM_STEPS if turbo and weights else None
    return Published("TurboDiffusion (SLA)" if turbo else "SLA", recipe, learned, weights, steps=steps)


def _dense(
    _learned: Mapping[str, Mapping[str, torch.Tensor]], weights: Mapping[str, torch.Tensor], name: str
) -> Published:
    return Published("a whole model", None, {}, weights, steps=_RCM_STEPS if _is_rcm(name) else None)


def _is_rcm(name: str) -> bool:
    return re.search(r"(?<![a-z])rcm(?![a-z])", name.lower()) is not None


def _lora(plain: Mapping[str, torch.Tensor], name: str) -> Published:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    added: dict[str, torch.Tensor] = {}
    alphas: dict[str, float] = {}
    for key, value in plain.items():
        ends = (*_LORA, *_ALPHAS, *_ADDED)
        end = max((one for one in ends if key.endswith(one)), key=len, default=None)
        if end is None:
            raise ValueError(f"{name} looks like a LoRA, and holds {key}, which is no part of one.")
        path = diffusers_path(key.removesuffix(end))
        if end in _LORA:
            halves.setdefault(path, {})[_LORA[end]] = value
        elif end in _ALPHAS:
            alphas[path] = float(value)
        else:
            added[path + _ADDED[end]] = value
    lora = {}
    for path, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"{name} holds only half of the LoRA of {path}.")
        down, up = pair["A"], pair["B"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"{name} has a LoRA of {path} with {tuple(up.shape)} times {tuple(down.shape)}.")
        lora[path] = (down, up * (alphas.get(path, down.shape[0]) / down.shape[0]))
    gates = _gates_of_lora(lora, added)
    if gates:
        # A model without gates has zeros there, and a LoRA of them is all of them.
        found = _fastwan(gates, {}, name)
        return Published("FastWan (VSA), as a LoRA", found.recipe, gates, {}, added, lora)
    lightning = re.search(r"lightx2v.*(4_?step|step_?distill)|(4_?step|step_?distill).*lightx2v", name.lower())
    steps = FewSteps(_shifted((1.0, 0.75, 0.5, 0.25), 5.0), renoise=False) if lightning else None
    steps = _RCM_STEPS if _is_rcm(name) else steps
    return Published("a LoRA", None, {}, {}, added, lora, steps)


def _gates_of_lora(
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]], added: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """VSA gates by the path of their attention, taken out of what is for the model."""
    gates: dict[str, dict[str, torch.Tensor]] = {}
    for path in [path for path in lora if path.endswith(f".{_GATE}")]:
        down, up = lora.pop(path)
        weight = up.float() @ down.float()
        gates[path.removesuffix(f".{_GATE}")] = {"weight": weight, "bias": torch.zeros(weight.shape[0])}
    for key in [key for key in added if f".{_GATE}." in key]:
        path, _, leaf = key.partition(f".{_GATE}.")
        gate = gates.setdefault(path, {})
        gate[leaf] = gate[leaf] + added.pop(key).float() if leaf in gate else added.pop(key)
    return gates


def _shifted(sigmas: tuple[float, ...], shift: float) -> tuple[float, ...]:
    spread: Callable[[float], float] = lambda sigma: shift * sigma / (1 + (shift - 1) * sigma)  # noqa: E731
    return tuple(map(spread, sigmas))
