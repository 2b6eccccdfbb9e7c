"""``dit-accel compare``: the same prompts and seeds, dense and under recipes, clip by clip."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..files import refuse_unwritable_folder
from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    quiet_libraries,
    read_device,
    read_dtype,
    read_recipe,
    read_size,
)


@one_sentence_errors
def compare(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe to judge, changes after semicolons; may be repeated. Default: auto, what patch(pipe) does.",
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: 16 prompts.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 0.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each clip, dense and under each recipe.")] = 1,
    metrics: Annotated[str | None, typer.Option(help="Names, by comma. Default: all that run.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for clips and report.")] = Path("outputs/compare"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge recipes against dense attention: fidelity per clip, density, time; JSON, film and page.

    Dense and the recipes take turns, clip by clip, after an untimed warm-up of each; every run is patched anew.

    Example:

    dit-accel compare --recipe auto --recipe "pooled;select.density=0.1" --count 4
    """
    quiet_libraries()
    pixels = read_size(size) if size else None
    asked_for = recipe or ["auto"]
    if len(set(asked_for)) != len(asked_for):
        raise ValueError(f"--recipe must not repeat a recipe, got {', '.join(asked_for)}.")
    # The unpatched pipeline is called dense in the report; the recipe of that name is measured like any other.
    recipes = {"dense (patched)" if text == "dense" else text: read_recipe(text, None) for text in asked_for}
    target = read_device(device)
    number = read_dtype(dtype, target)
    refuse_unwritable_folder(out)

    from ..pipelines.generate import call_arguments, frames_per_second
    from ..quality.compare import compare as run
    from ..quality.metrics import find_metrics
    from ..quality.prompts import DEFAULT_PROMPTS
    from .compare_table import show
    from .model import open_model

    chosen = metrics.split(",") if metrics else None
    find_metrics(chosen)
    prompts = list(prompt or ()) or list(DEFAULT_PROMPTS)
    if prompts_file is not None:
        prompts = [line.strip() for line in prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    name, builtin, pipe = open_model(model, number, target, quiet=as_json)
    settings = dict(vars(builtin.settings)) if builtin else {}
    width, height = pixels or (None, None)
    asked = {"width": width, "height": height, "frames": frames, "steps": steps, "guidance": guidance}
    settings |= {key: value for key, value in asked.items() if value is not None}
    pipe.set_progress_bar_config(disable=True)
    report = run(
        pipe,
        recipes,
        prompts[:count],
        seed or (0,),
        metrics=chosen,
        generate_kwargs=call_arguments(pipe, **settings),
        out=out,
        fps=frames_per_second(pipe),
        repeat=repeat,
        facts={"model": name, "command": " ".join(["dit-accel", *sys.argv[1:]])},
        progress=lambda line: print(line, file=sys.stderr),
    )
    if as_json:
        print((out / "report.json").read_text(encoding="utf-8"))
        return
    show(report)
    print(f"{out / 'index.html'} has the clips, the table and the plot.")
