"""``dit-accel inspect``: where the attention of a model lies, and what a recipe's mask keeps of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    SetOption,
    quiet_libraries,
    read_device,
    read_dtype,
    read_recipe,
    read_size,
)


@one_sentence_errors
def inspect(
    prompt: Annotated[str, typer.Option(help="What to generate.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose masks to judge.")] = "pooled",
    changes: SetOption = None,
    at_step: Annotated[list[int] | None, typer.Option(help="Step to look at; may be repeated. All.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layer to look at; may be repeated. All.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/inspect"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Picture block mass, masks, recall and change over steps, per layer and head."""
    quiet_libraries()
    pixels = read_size(size) if size else None
    chosen = read_recipe(recipe, changes)
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..pipelines.generate import generate
    from ..presets import automatic
    from ..quality.inspect_pipeline import inspect_pipeline
    from .model import open_model

    _, builtin, pipe = open_model(model, number, target, quiet=as_json)
    settings = dict(vars(builtin.settings)) if builtin else {}
    width, height = pixels or (None, None)
    asked = {"width": width, "height": height, "frames": frames, "steps": steps}
    settings |= {key: value for key, value in asked.items() if value is not None}
    found = inspect_pipeline(
        pipe,
        lambda: generate(pipe, prompt, **settings, seed=seed),
        out,
        recipe=chosen or automatic(),
        steps=at_step,
        layers=layer,
    )
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    for order in sorted({finding.order for finding in found.findings}):
        print(f"{order}: {found.target:.0%} of the mass lies in {found.mean_density(order):.3f} of the blocks")
    print(f"{out} holds the maps, masks and tables.")
