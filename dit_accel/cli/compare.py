"""``dit-accel compare``: the same prompts and seeds, dense and under recipes, clip by clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .comparison import Comparison
from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    GuidanceOption,
    ImportOption,
    JsonOption,
    ModelArgument,
    PromptsFileOption,
    SizeOption,
    StartOverOption,
    StepsOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_prompts,
    read_recipe,
    read_seed,
)
from .settings import Asked

DEFAULT = Path("outputs/compare")


@one_sentence_errors
def compare(
    model: ModelArgument = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe to judge, changes after semicolons; may be repeated. Default: auto, what patch(pipe) does.",
        ),
    ] = None,
    imports: ImportOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: 16 prompts.")] = None,
    prompts_file: PromptsFileOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: 0.")] = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each clip, dense and under each recipe.")] = 1,
    metrics: Annotated[str | None, typer.Option(help="Names, by comma. Default: all that run.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for clips and report. Default: {DEFAULT}, or a free name.")
    ] = None,
    start_over: StartOverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge recipes against dense attention: fidelity per clip, density, time; JSON, film and page.

    Dense and the recipes take turns, clip by clip, after an untimed warm-up of each; every run is patched anew.
    An interrupted comparison goes on with the next clip.
    """
    quiet_libraries()
    import_modules(imports)
    asked, seeds = Asked.read(size, frames, steps, guidance), [read_seed(number) for number in seed or (0,)]
    prompts = read_prompts(prompt, prompts_file)
    asked_for = recipe or ["auto"]
    if len(set(asked_for)) != len(asked_for):
        raise ValueError(f"--recipe must not repeat a recipe, got {', '.join(asked_for)}.")
    # The unpatched pipeline is called dense in the report; the recipe of that name is measured like any other.
    recipes = {"dense (patched)" if text == "dense" else text: read_recipe(text, None) for text in asked_for}
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..presets.searched import FEW_STEPS
    from ..quality.prompts import DEFAULT_PROMPTS
    from ..quality.report import REPORT
    from ..quality.turns import steps_to_warm_up
    from .compare_table import show
    from .model import choose_model, open_model

    comparison = Comparison(
        choose_model(model)[0],
        recipes,
        (prompts or DEFAULT_PROMPTS)[:count],
        seeds,
        asked,
        number,
        target,
        metrics.split(",") if metrics else None,
        repeat,
    )
    parts = comparison.claim(out, DEFAULT, start_over)
    report = comparison.finished(parts)
    if report is None:
        _, builtin, pipe = open_model(model, number, target, quiet=as_json)
        report = comparison.run(pipe, builtin, parts, warm_up_steps=steps_to_warm_up(target.type, FEW_STEPS))
    if as_json:
        print((parts.folder / REPORT).read_text(encoding="utf-8"))
        return
    show(report)
    print(f"{parts.folder / 'index.html'} has the clips, the table and the plot.")
