"""What a folder remembers of a model, exactly: a short training changes weights by less than another dtype does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..patches.fingerprint import Fingerprint
from ..plain_data import as_plain, digest, first_difference

# Facts that must be equal to the bit, in words.
OF_WEIGHTS = {"weights": "weights", "lora": "LoRA layers"}


def model_facts(model: nn.Module, attentions: Mapping[str, nn.Module]) -> dict[str, Any]:
    """A model as plain data: its fingerprint, and a digest of LoRA layers in it, which no fingerprint counts."""
    lora = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    facts: dict[str, Any] = as_plain(Fingerprint.of(model, attentions).to_dict())
    return {**facts, "lora": digest(lora) if lora else None}


def model_difference(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """How two models of a name differ, by their facts; None if they are the same to the bit."""
    was, now = ({part: value for part, value in side.items() if part not in OF_WEIGHTS} for side in (there, here))
    # Other versions of diffusers know other settings.
    if difference := first_difference(was, now, shared=True):
        return f"{name}.{difference}"
    for part, spelled in OF_WEIGHTS.items():
        # As text, in which a NaN equals itself.
        if json.dumps(there.get(part)) != json.dumps(here.get(part)):
            return f"other {spelled} of the {name}"
    return None
