"""``dit-accel search``: a density and an order per head from measured errors, as a recipe file."""

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
def search(
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe whose selection takes a density per head.")] = "pooled",
    changes: SetOption = None,
    density: Annotated[float | None, typer.Option(help="Target: mean share of the blocks to keep.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Target, in place of a density: relative error of the velocity.")
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(help="An order that heads may choose: fhw, fwh, hfw, hwf, wfh, whf or tiles. May be repeated."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Denoising steps of each prompt to measure heads at.")] = 3,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: two prompts.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="A text file, one prompt a line.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each further one adds 1.")] = 0,
    out: Annotated[Path, typer.Option(help="The recipe file to write; it ends in .json.")] = Path("outputs/found.json"),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what each head's sparsity does to the velocity, and share a budget of blocks out among heads."""
    quiet_libraries()
    pixels = read_size(size) if size else None
    chosen = read_recipe(recipe, changes)
    if chosen is None:
        raise ValueError("--recipe auto has no selection to share out; name a recipe, such as pooled.")
    if (density is None) == (max_error is None):
        raise ValueError(f"--density or --max-error is the target, got {density} and {max_error}.")
    if out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {str(out)!r}.")
    prompts = list(prompt or ())
    if prompts_file is not None:
        prompts += [line.strip() for line in prompts_file.read_text().splitlines() if line.strip()]
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..calibration.search import search as run
    from ..pipelines.generate import call_arguments
    from ..quality.prompts import DEFAULT_PROMPTS
    from .model import open_model

    name, builtin, pipe = open_model(model, number, target, quiet=as_json)
    settings = dict(vars(builtin.settings)) if builtin else {}
    width, height = pixels or (None, None)
    asked = {"width": width, "height": height, "frames": frames, "steps": steps, "guidance": guidance}
    settings |= {key: value for key, value in asked.items() if value is not None}
    pipe.set_progress_bar_config(disable=True)
    with progress_bar("searching", quiet=as_json) as progress:
        found = run(
            pipe,
            prompts or DEFAULT_PROMPTS[:2],
            chosen,
            mean_density=density,
            max_error=max_error,
            orders=tuple(order or ()),
            samples=samples,
            seed=seed,
            generate_kwargs=call_arguments(pipe, **settings),
            progress=progress,
        )
    found.recipe.save(out)
    report: dict[str, Any] = {
        "model": name,
        "recipe": found.recipe.to_dict(),
        "file": str(out),
        "density": found.density,
        "predicted_error": found.predicted_error,
        "predicted_error_uniform": found.predicted_uniform,
        "orders": {key: _count(found.recipe.to_dict()["order"].get("axes", ()), key) for key in order or ()},
        "measured": {
            "densities": found.errors.densities,
            "kept": found.errors.kept.tolist(),
            "error": found.errors.error.tolist(),
        },
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"density {found.density:.3f}; predicted error of the velocity {found.predicted_error:.4f},")
    print(f"with one density for all heads {found.predicted_uniform:.4f}")
    if order:
        print("heads by order: " + ", ".join(f"{key} {count}" for key, count in report["orders"].items()))
    print(f"{out}; use it with patch(pipe, {str(out)!r}) or --recipe {out}")


def _count(axes: tuple[tuple[str, ...], ...], name: str) -> int:
    return sum(layer.count(name) for layer in axes)
