"""What was seen of one attention call, in a file of tensors, until a whole run is put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..tensor_files import write_tensors
from .inspection import Observation
from .patterns import BlockPattern

SUFFIX = ".safetensors"
_TENSORS = tuple(one.name for one in fields(BlockPattern))


def write_observations(observations: Sequence[Observation], path: Path) -> None:
    """Keep the observations of one call, each under an order of its own.

    Raises:
        ValueError: the file cannot be written.
    """
    tensors = {
        f"{one.order}/{name}": value
        for one in observations
        for name in _TENSORS
        if (value := getattr(one.pattern, name)) is not None
    }
    facts = [{"layer": one.layer, "step": one.step, "order": one.order, "sigma": one.sigma} for one in observations]
    write_tensors(path, tensors, {"observations": json.dumps(facts)})


def read_observations(path: Path) -> list[Observation] | None:
    """What :func:`write_observations` kept, on the CPU; None where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return [
                Observation(
                    one["layer"],
                    one["step"],
                    one["order"],
                    BlockPattern(
                        **{
                            name: file.get_tensor(key)
                            for name in _TENSORS
                            if (key := f"{one['order']}/{name}") in names
                        }
                    ),
                    one["sigma"],
                )
                for one in json.loads(file.metadata()["observations"])
            ]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error).rstrip('.')}); delete it.") from error
