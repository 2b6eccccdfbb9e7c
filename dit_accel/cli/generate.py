"""``dit-accel generate``: one prompt, one video or image, and what it cost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .against_dense import SideRun, compared, print_comparison
from .errors import one_sentence_errors
from .options import (
    BackendOption,
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

if TYPE_CHECKING:
    from ..patches.handle import PatchHandle
    from ..pipelines.generate import Generated


@one_sentence_errors
def generate(
    prompt: Annotated[str, typer.Option(help="What to generate.")],
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, local folder or built-in model. Default: the best built-in model."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels. Default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a video. Default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the model's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    recipe: Annotated[
        str,
        typer.Option(help="`auto`, `dense` for the model's own attention, or a name from `dit-accel info`."),
    ] = "auto",
    changes: SetOption = None,
    calibration: Annotated[Path | None, typer.Option(help="A file of `dit-accel calibrate`.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A fine-tuned adapter in place of a recipe: a folder, or a name from `dit-accel info`."),
    ] = None,
    backend: BackendOption = "auto",
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Also generate dense with the same seed, in turns, and compare.")
    ] = False,
    repeat: Annotated[
        int, typer.Option(min=1, help="With --compare-dense: timed runs of each side. From 2 on there is a spread.")
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="File to write (.mp4 or .png). Default: outputs/MODEL-SEED.")] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate a video or an image from a prompt, accelerated, and say what ran."""
    quiet_libraries()
    pixels = read_size(size) if size else None
    if adapter is not None and (recipe != "auto" or changes):
        raise ValueError(f"--adapter brings its own recipe, got --recipe {recipe} and {len(changes or ())} changes.")
    if adapter is not None and calibration is not None:
        raise ValueError(f"--adapter brings its own recipe and takes no calibration, got {calibration}.")
    if repeat > 1 and not compare_dense:
        raise ValueError(f"--repeat goes with --compare-dense, got --repeat {repeat} alone.")
    chosen = read_recipe(recipe, changes)
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..api import patch
    from ..pipelines.generate import generate as run
    from ..pipelines.generate import makes_video, output_path, save
    from ..quality.turns import WARM_UP_STEPS, measured_in_turns
    from .model import find_adapter, open_model

    name, builtin, pipe = open_model(model, number, target, quiet=as_json)
    folder = None if adapter is None else find_adapter(adapter, builtin)
    default = Path("outputs") / f"{name.strip('./').replace('/', '--')}-{seed}"
    path = output_path(out or default, makes_video(pipe))
    arguments: dict[str, Any] = {"negative_prompt": negative_prompt}
    if builtin is not None:
        arguments |= vars(builtin.settings)
    width, height = pixels or (None, None)
    asked = {"width": width, "height": height, "frames": frames, "steps": steps, "guidance": guidance}
    arguments |= {key: value for key, value in asked.items() if value is not None}

    def generated(label: str, short: bool) -> Generated:
        if short:
            _say(f"Warming up: {label}", as_json)
            return run(pipe, prompt, **{**arguments, "steps": warm_up_steps}, seed=seed)
        with _progress(label, quiet=as_json) as advance:
            result = run(pipe, prompt, **arguments, seed=seed, progress=advance)
        if result.nan_values:
            print(
                f"Warning: {result.nan_values} pixel values are not finite and were made black.",
                file=sys.stderr,
            )
        return result

    def accelerated() -> PatchHandle:
        if folder is None:
            return patch(pipe, chosen, backend=backend, calibration=calibration)
        from ..training.adapter import load_adapter

        return load_adapter(pipe, folder, backend=backend)

    def dense_side(short: bool) -> SideRun:
        return SideRun(generated("dense", short))

    def fast_side(short: bool) -> SideRun:
        # Patched for this run alone: it keeps nothing of the warm-up or of another run.
        with accelerated() as handle:
            made = generated("accelerated" if recipe != "dense" else "dense", short)
            return SideRun(made, handle.summary(), handle.recipe)

    sides = {"dense": dense_side, "accelerated": fast_side} if compare_dense else {"accelerated": fast_side}
    with accelerated():
        pass  # what cannot be patched is refused before the dense side has run
    warm_up_steps = min(WARM_UP_STEPS, arguments.get("steps") or WARM_UP_STEPS)
    runs = measured_in_turns(sides, repeat, warm_up=compare_dense or target.type == "cuda")
    fast, summary, used = runs["accelerated"][0]
    assert summary is not None
    assert used is not None
    files = {"out": str(save(fast, path))}
    if compare_dense:
        files["dense"] = str(save(runs["dense"][0].made, path.with_name(f"{path.stem}.dense{path.suffix}")))
    report = {
        "model": name,
        "random_weights": bool(builtin and "RANDOM" in builtin.description),
        "prompt": prompt,
        "seed": seed,
        "settings": arguments,
        "dtype": str(number).removeprefix("torch."),
        "recipe": used.to_dict(),
        "adapter": adapter,
        "seconds": fast.seconds,
        **(compared(runs["dense"], runs["accelerated"], warm_up_steps) if compare_dense else {}),
        "density": summary.density,
        "mean_density": summary.mean_density,
        "nan_values": fast.nan_values,
        "files": files,
        "summary": summary.to_dict(),
    }
    if as_json:
        from .environment import environment

        print(json.dumps({**report, **environment(target)}, indent=2))
    else:
        _show(report, str(summary))


def _progress(label: str, quiet: bool) -> Any:
    """A bar on stderr, so that stdout holds the result alone; entering it gives the callback."""
    from contextlib import contextmanager, nullcontext

    if quiet:
        return nullcontext(None)

    @contextmanager
    def bar() -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:>11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(label, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    return bar()


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr)


def _show(report: dict[str, Any], summary: str) -> None:
    if "turns" in report:
        print_comparison(report)
    else:
        print(f"this recipe  {report['seconds']:8.2f} s   {report['files']['out']}")
    if report["random_weights"]:
        print("The weights are random: the times are real, the pictures mean nothing.")
    print(summary)
