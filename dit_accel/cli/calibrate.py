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
    JsonOption,
    SetOption,
    quiet_libraries,
    read_device,
    read_dtype,
    read_recipe,
    read_size,
)
from .progress import progress_bar


@one_sentence_errors
def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A name from `dit-accel info`.")] = "paro",
    changes: SetOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: two prompts.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    buckets: Annotated[int, typer.Option(min=1, help="Noise levels with masks of their own.")] = 4,
    axis_prompts: Annotated[int, typer.Option(min=1, help="Prompts that axis orders are measured on.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted calibration of this file.")] = True,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("outputs/calibration.safetensors"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a few prompts densely and keep the plans that a recipe would make; interrupted, it resumes."""
    quiet_libraries()
    pixels = read_size(size) if size else None
    chosen = read_recipe(recipe, changes)
    if chosen is None:
        raise ValueError("--recipe auto has nothing to calibrate; name a recipe, such as paro.")
    prompts = list(prompt or ())
    if prompts_file is not None:
        prompts += [line.strip() for line in prompts_file.read_text().splitlines() if line.strip()]
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..calibration.calibrate import calibrate as run
    from ..pipelines.generate import call_arguments
    from ..quality.prompts import DEFAULT_PROMPTS
    from .model import open_model

    name, builtin, pipe = open_model(model, number, target, quiet=as_json)
    settings = dict(vars(builtin.settings)) if builtin else {}
    width, height = pixels or (None, None)
    asked = {"width": width, "height": height, "frames": frames, "steps": steps, "guidance": guidance}
    settings |= {key: value for key, value in asked.items() if value is not None}
    pipe.set_progress_bar_config(disable=True)
    with progress_bar("calibrating", quiet=as_json) as progress:
        artifact = run(
            pipe,
            prompts or DEFAULT_PROMPTS[:2],
            chosen,
            out=out,
            buckets=buckets,
            axis_prompts=axis_prompts,
            generate_kwargs=call_arguments(pipe, **settings),
            resume=resume,
            progress=progress,
        )
    report: dict[str, Any] = {
        "model": name,
        "recipe": chosen.to_dict(),
        "file": str(out),
        "megabytes": out.stat().st_size / 1e6,
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
    print(f"{out}, {report['megabytes']:.1f} MB; use it with patch(pipe, {recipe!r}, calibration={str(out)!r})")
