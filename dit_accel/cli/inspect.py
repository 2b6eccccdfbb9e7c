"""``dit-accel inspect``: where the attention of a model lies, and what a recipe's mask keeps of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    ImportOption,
    JsonOption,
    ModelArgument,
    SetOption,
    SizeOption,
    StartOverOption,
    StepsOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_prompt,
    read_recipe,
    read_seed,
)
from .output import PIPELINE, claimed_folder
from .settings import Asked

DEFAULT = Path("outputs/inspect")


@one_sentence_errors
def inspect(
    prompt: Annotated[str, typer.Option(help="What to generate.")],
    model: ModelArgument = None,
    recipe: Annotated[str, typer.Option(help="Whose masks to judge.")] = "pooled",
    changes: SetOption = None,
    imports: ImportOption = None,
    at_step: Annotated[list[int] | None, typer.Option(help="Step to look at; may be repeated. All.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layer to look at; may be repeated. All.")] = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for the pictures. Default: {DEFAULT}, or a free name.")
    ] = None,
    start_over: StartOverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Picture block mass, masks, recall and change over steps, per layer and head.

    Interrupted, it keeps the maps of the calls that it has seen, and generates again for the others.
    """
    quiet_libraries()
    import_modules(imports)
    asked, seed, prompt = Asked.read(size, frames, steps), read_seed(seed), read_prompt(prompt)
    chosen = read_recipe(recipe, changes)
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..calibration.identity import describe_pipeline
    from ..pipelines.generate import generate
    from ..presets import automatic
    from ..quality.inspect_pipeline import inspect_pipeline
    from ..quality.inspection import FILE
    from .environment import decisive
    from .model import choose_model, open_model

    what_decides = {
        "model": choose_model(model)[0],
        "prompt": prompt,
        "seed": seed,
        "settings": vars(asked),
        "recipe": (chosen or automatic()).to_dict(),
        "at_step": at_step,
        "layer": layer,
        **decisive(number, target),
    }
    parts = claimed_folder(
        out, DEFAULT, what_decides, lambda parts: not (parts.folder / FILE).exists(), FILE, start_over
    )
    folder = parts.folder
    _, builtin, pipe = open_model(model, number, target, quiet=as_json)
    parts.claim(describe_pipeline(pipe), (), PIPELINE)
    settings = asked.settings(pipe, builtin)
    _refuse_beyond("--at-step", at_step, "steps", settings.get("steps") or _own_steps(pipe))
    _refuse_beyond("--layer", layer, "layers", _layers(pipe))
    found = inspect_pipeline(
        pipe,
        lambda: generate(pipe, prompt, **settings, seed=seed),
        folder,
        recipe=chosen or automatic(),
        steps=at_step,
        layers=layer,
        parts=parts,
    )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for order in sorted({finding.order for finding in found.findings}):
        print(f"{order}: {found.target:.0%} of the mass lies in {found.mean_density(order):.3f} of the blocks")
    print(f"{folder} holds the maps, masks and tables.")


def _refuse_beyond(option: str, numbers: list[int] | None, of: str, count: int | None) -> None:
    """Numbers count from 0; None where nobody knows how many there are."""
    for number in numbers or ():
        if number < 0 or (count is not None and number >= count):
            last = "" if count is None else f" to {count - 1}, of {count} {of}"
            raise ValueError(f"{option} must lie in 0{last}, got {number}.")


def _own_steps(pipe: Any) -> int | None:
    own = signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return own.default if own is not None and isinstance(own.default, int) else None


def _layers(pipe: Any) -> int:
    """Self-attention layers of the transformer that has the most."""
    from ..patches.targets import self_attentions, transformers_of

    return max(len(list(self_attentions(model, family))) for _, model, family in transformers_of(pipe))
