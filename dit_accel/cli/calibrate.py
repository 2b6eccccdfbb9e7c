"""``dit-accel calibrate``: plans made offline from a few prompts, as a file for ``patch(..., calibration=file)``."""

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
    StepsOption,
    import_modules,
    quiet_libraries,
    read_recipe,
)
from .output import free_name
from .progress import progress_bar
from .settings import Asked
from .workload import Workload

DEFAULT = Path("outputs/calibration.safetensors")


@one_sentence_errors
def calibrate(
    model: ModelArgument = None,
    recipe: Annotated[str, typer.Option(help="A name from `dit-accel info`.")] = "paro",
    changes: SetOption = None,
    imports: ImportOption = None,
    prompt: PromptsOption = None,
    prompts_file: PromptsFileOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    buckets: Annotated[int, typer.Option(min=1, help="Noise levels with masks of their own.")] = 4,
    axis_prompts: Annotated[int, typer.Option(min=1, help="Prompts that axis orders are measured on.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted calibration of this file.")] = True,
    out: Annotated[Path | None, typer.Option(help=f"The file to write. Default: {DEFAULT}, or a free name.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a few prompts densely and keep the plans that a recipe would make; interrupted, it resumes."""
    quiet_libraries()
    import_modules(imports)
    asked = Asked.read(size, frames, steps, guidance)
    chosen = read_recipe(recipe, changes)
    if chosen is None:
        raise ValueError("--recipe auto has nothing to calibrate; name a recipe, such as paro.")
    work = Workload.read(prompt, prompts_file, asked, device, dtype)

    from ..calibration.calibrate import calibrate as run
    from ..calibration.calibrate import refuse_calibration

    path = out or free_name(DEFAULT)
    refuse_calibration(chosen, path)
    opened = work.open(model, quiet=as_json)
    with progress_bar("calibrating", quiet=as_json) as progress:
        artifact = run(
            opened.pipe,
            opened.prompts,
            chosen,
            out=path,
            buckets=buckets,
            axis_prompts=axis_prompts,
            generate_kwargs=opened.arguments,
            resume=resume,
            progress=progress,
        )
    report: dict[str, Any] = {
        "model": opened.name,
        "recipe": chosen.to_dict(),
        "file": str(path),
        "megabytes": path.stat().st_size / 1e6,
        "transformers": {
            part_name or "transformer": {
                "grid": part.masks.layout.grid,
                "noise_levels": len(part.masks.edges) + 1,
                "edges": part.masks.edges,
            }
            for part_name, part in artifact.transformers.items()
        },
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for part_name, part in report["transformers"].items():
        print(f"{part_name}: grid {part['grid']}, {part['noise_levels']} noise levels")
    print(f"{path}, {report['megabytes']:.1f} MB; use it with patch(pipe, {recipe!r}, calibration={str(path)!r})")
