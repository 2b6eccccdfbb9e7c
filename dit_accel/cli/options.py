"""Options that the commands share, and how their text is read."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="AXIS.FIELD=VALUE", help="Change one field of the recipe; may be repeated."),
]
BackendOption = Annotated[str, typer.Option(help="Backend of the sparse attention; see `dit-accel info`.")]
DtypeOption = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="Default: bf16 on a GPU or a CPU with AMX, else fp32.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Default: cuda if there is a GPU, else cpu.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def read_size(text: str) -> tuple[int, int]:
    """Pixel width and height from ``WxH``."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if match is None or "0" in match.groups():
        raise ValueError(f"--size must be WIDTHxHEIGHT in pixels, such as 832x480, got {text!r}.")
    return int(match[1]), int(match[2])


def read_recipe(name: str, changes: Sequence[str] | None) -> Recipe | None:
    """A preset with single fields changed, by ``--set`` or after semicolons; None for ``auto`` without changes."""
    from .. import presets

    name, *inline = (part.strip() for part in name.split(";"))
    changes = [*filter(None, inline), *(changes or ())]
    if name == "auto":
        if not changes:
            return None
        return presets.automatic().with_fields(_read_changes(changes))
    return presets.resolve(name).with_fields(_read_changes(changes))


def _read_changes(changes: Sequence[str]) -> dict[str, str]:
    """Fields and their new values from ``AXIS.FIELD=VALUE``."""
    fields = {}
    for change in changes:
        field, equals, value = change.partition("=")
        if not equals or not field or not value:
            raise ValueError(f"--set must be AXIS.FIELD=VALUE, such as select.density=0.1, got {change!r}.")
        fields[field.strip()] = value.strip()
    return fields


def read_device(name: str | None) -> torch.device:
    """A device that is really there."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name} is not there: {torch.cuda.device_count()} CUDA devices found.")
    return device


def read_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """A dtype by its short name, or the device's usual one."""
    import torch

    if name is None:
        from ..pipelines.loading import usual_dtype

        return usual_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}.")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


def quiet_libraries() -> None:
    """The commands have their own progress and messages. Call it before diffusers is imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
