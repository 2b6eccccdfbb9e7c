"""Options that the commands share, and how their text is read."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from ..recipe import Recipe

# Of a side in pixels, and of a seed: another one follows for each further prompt.
LONGEST_SIDE, LARGEST_SEED = 32768, 2**62
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
]
PromptsOption = Annotated[list[str] | None, typer.Option(help="May be repeated. Default: two prompts.")]
PROMPTS_FILE_HELP = "A UTF-8 text file, one prompt a line; blank lines and # comments are not."
PromptsFileOption = Annotated[Path | None, typer.Option(help=PROMPTS_FILE_HELP)]
SizeOption = Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")]
FramesOption = Annotated[int | None, typer.Option(min=1, max=100_000, help="Of a video. Default: the model's.")]
StepsOption = Annotated[int | None, typer.Option(min=1, max=10_000, help="Denoising steps. Default: the model's.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="AXIS.FIELD=VALUE", help="Change one field of the recipe; may be repeated."),
]
ImportOption = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a module that registers recipes, stages or families; may be repeated.",
    ),
]
BackendOption = Annotated[str, typer.Option(help="Backend of the sparse attention; see `dit-accel info`.")]
DtypeOption = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="Default: bf16 on a GPU or a CPU with AMX, else fp32.")
]
DeviceOption = Annotated[str | None, typer.Option(help="Default: cuda if there is a GPU, else cpu.")]
GraphsOption = Annotated[
    bool,
    typer.Option(
        "--graphs",
        help="The accelerated side's blocks replayed as CUDA graphs while plans stay, which spares the host's time.",
    ),
]
LinearOption = Annotated[
    str | None, typer.Option(metavar="fp8|int8", help="The accelerated side's linear layers in 8 bits, by torchao.")
]
VaeOption = Annotated[
    str | None,
    typer.Option(
        metavar="SETTINGS",
        help="The accelerated side's autoencoder: some of tiled, sliced, channels_last, bf16, fp16, compiled, "
        "frames=N (Wan: N latent frames at once), tile=N (tiles of N pixels), separated by commas. channels_last "
        "helps Wan and costs HunyuanVideo time.",
    ),
]
StartOverOption = Annotated[bool, typer.Option("--start-over", help="Forget what the folder holds of earlier runs.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def refuse_beside_attention(linear: str | None, vae: str | None, device: torch.device) -> None:
    """Refuse, before a model is loaded, what ``--linear`` and ``--vae`` cannot be.

    Raises:
        ValueError: an unknown setting, or linear layers that this device or what is installed cannot have.
    """
    from ..acceleration.decoding import read_settings
    from ..acceleration.linears import refuse_format

    if vae is not None:
        read_settings(vae)
    if linear is not None:
        refuse_format(linear, device)


def read_size(text: str) -> tuple[int, int]:
    """Pixel width and height from ``WxH``."""
    match = re.fullmatch(r"(\d{1,99})[xX](\d{1,99})", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not width or not height:
        raise ValueError(f"--size must be WIDTHxHEIGHT in pixels, such as 832x480, got {text!r}.")
    if max(width, height) > LONGEST_SIDE:
        raise ValueError(f"--size must be at most {LONGEST_SIDE} pixels a side, got {text!r}.")
    return width, height


def read_seed(seed: int) -> int:
    """A seed that random generators take."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"--seed must lie in 0 to {LARGEST_SEED}, got {seed}.")
    return seed


def read_prompt(text: str, option: str = "--prompt") -> str:
    """The text of an option in any script, also where the locale is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        try:
            # Python keeps bytes that the locale does not know as lone surrogates.
            return os.fsencode(text).decode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"{option} must be UTF-8 text: {error.reason} at byte {error.start}.") from error
    return text


def read_prompts(prompts: Sequence[str] | None, file: Path | None) -> list[str]:
    """Prompts of ``--prompt``, then those of ``--prompts-file``: its lines but blank ones and comments (``#``)."""
    found = [read_prompt(prompt) for prompt in prompts or ()]
    if file is None:
        return found
    try:
        # Editors may begin a file with a byte order mark.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {file} must be UTF-8 text: {error.reason} at byte {error.start}.") from error
    except OSError as error:
        raise ValueError(f"--prompts-file {file} cannot be read: {error.strerror or error}.") from error
    # By line feeds alone: other scripts have characters that Python takes for line ends.
    lines = [line for line in map(str.strip, text.split("\n")) if line and not line.startswith("#")]
    if not lines:
        raise ValueError(f"--prompts-file {file} must hold a prompt, one a line, got none.")
    return [*found, *lines]


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
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", name)
    if match is None:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}.")
    device = torch.device(name)
    if device.type == "cuda" and int(match[1] or 0) >= torch.cuda.device_count():
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


def import_modules(names: Sequence[str] | None) -> None:
    """Import modules that register what a recipe names; those of the working folder too."""
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind all others, so that it hides no installed module
    for name in names or ():
        try:
            import_module(name)
        except Exception as error:
            raise ValueError(f"--import {name} failed: {type(error).__name__}: {error}") from error


def quiet_libraries() -> None:
    """The commands have their own progress and messages. Call it before diffusers is imported."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
