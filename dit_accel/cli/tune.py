"""``dit-accel tune``: the fastest recipe that keeps an error, or a time, which the user names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
    PromptsOption,
    SetOption,
    SizeOption,
    StartOverOption,
    StepsOption,
    import_modules,
    quiet_libraries,
    read_recipe,
    read_seed,
)
from .progress import progress_bar
from .settings import Asked
from .workload import Workload

DEFAULT = Path("outputs/tune")


@one_sentence_errors
def tune(
    model: ModelArgument = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE",
            help="What to keep: psnr=35 (dB to dense), ssim=0.95 or lpips=0.05, as fast as possible; or speedup=2.5.",
        ),
    ] = "psnr=35",
    recipe: Annotated[str, typer.Option(help="Whose density and dense phase are chosen.")] = "mass",
    changes: SetOption = None,
    imports: ImportOption = None,
    prompt: PromptsOption = None,
    prompts_file: PromptsFileOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each further one adds 1.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile of the transformer's blocks, of dense runs too.")
    ] = False,
    verify: Annotated[int, typer.Option(min=1, help="Combinations to run at most, with every prompt.")] = 4,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the recipe, the front, and what was run so far, which a second run goes on from."
        ),
    ] = DEFAULT,
    start_over: StartOverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Choose dense phase, density and steps to compute together, for an error or a time; interrupted, it goes on."""
    quiet_libraries()
    import_modules(imports)
    asked, seed = Asked.read(size, frames, steps, guidance), read_seed(seed)
    chosen = read_recipe(recipe, changes)
    if chosen is None:
        raise ValueError("--recipe auto is chosen by the model; name a recipe with a density, such as mass.")
    work = Workload.read(prompt, prompts_file, asked, device, dtype)

    from ..acceleration.compiled import compile_blocks
    from ..tuning.target import Target
    from ..tuning.tune import FRONT, recipe_path, refuse_tuning
    from ..tuning.tune import tune as run

    goal = Target.read(target)
    refuse_tuning(goal, chosen, verify, out)
    opened = work.open(model, quiet=as_json)
    if compiled:
        compile_blocks(opened.pipe)
    with progress_bar("tuning", quiet=as_json) as progress:
        found = run(
            opened.pipe,
            opened.prompts,
            goal,
            recipe=chosen,
            out=out,
            seeds=range(seed, seed + len(opened.prompts)),
            generate_kwargs=opened.arguments,
            verify=verify,
            start_over=start_over,
            progress=progress,
        )
    path = recipe_path(out, goal)
    if as_json:
        report: dict[str, Any] = {"model": opened.name, "file": str(path), **found.to_dict()}
        print(json.dumps(report, indent=2))
        return
    print(found.table())
    print(f"{found.row.name}: {found.spelled(found.row.fidelity)} at {found.row.speedup:.2f}x, measured")
    for note in found.notes:
        print(f"note: {note}")
    print(f"{path}; use it with patch(pipe, {str(path)!r}) or --recipe {path}. {out / FRONT} has the whole front.")
