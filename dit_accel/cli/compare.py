"""``dit-accel compare``: the same prompts and seeds, dense and under recipes, clip by clip."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

if TYPE_CHECKING:
    from ..quality.results import ComparisonReport


@one_sentence_errors
def compare(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[;AXIS.FIELD=VALUE...]",
            help="Recipe to judge, such as 'pooled;select.density=0.1'; may be repeated. Default: auto.",
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
    metrics: Annotated[str | None, typer.Option(help="Names, by comma. Default: all that run.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for clips and report.")] = Path("outputs/compare"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge recipes against dense attention: fidelity per clip, density, time; JSON, film and page."""
    quiet_libraries()
    pixels = read_size(size) if size else None
    recipes = {text: _recipe(text) for text in recipe or ["auto"]}
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..pipelines.generate import call_arguments, frames_per_second
    from ..quality.compare import compare as run
    from ..quality.prompts import DEFAULT_PROMPTS
    from .model import open_model

    prompts = list(prompt or ()) or list(DEFAULT_PROMPTS)
    if prompts_file is not None:
        prompts = [line.strip() for line in prompts_file.read_text().splitlines() if line.strip()]
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
        metrics=metrics.split(",") if metrics else None,
        generate_kwargs=call_arguments(pipe, **settings),
        out=out,
        fps=frames_per_second(pipe),
        facts={"model": name, "command": " ".join(["dit-accel", *sys.argv[1:]])},
        progress=lambda line: print(line, file=sys.stderr),
    )
    if as_json:
        print((out / "report.json").read_text())
        return
    _show(report)
    print(f"{out / 'index.html'} has the clips, the table and the plot.")


def _show(report: ComparisonReport) -> None:
    from rich.console import Console
    from rich.table import Table

    names = list(report.summary(report.recipes[0]).metrics)
    table = Table("recipe", "density", "seconds", "speed-up", *names, show_edge=False)
    for recipe in report.recipes:
        row = report.summary(recipe)
        table.add_row(
            recipe,
            "-" if row.density is None else f"{row.density.mean:.3f}",
            f"{row.total_seconds.mean:.2f}",
            f"{row.speedup.mean:.2f}x",
            *(f"{row.metrics[name].mean:.4g}" if name in row.metrics else "-" for name in names),
        )
    Console().print(table)
    for note in report.notes:
        print(f"note: {note}")
    for name, reasons in report.summary(report.recipes[0]).missing.items():
        print(f"{name} is missing: {'; '.join(reasons)}")


def _recipe(text: str) -> object:
    from ..presets import automatic

    name, *changes = (part.strip() for part in text.split(";"))
    chosen = read_recipe(name, changes)
    return automatic() if chosen is None else chosen
