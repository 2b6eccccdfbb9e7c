"""``dit-accel generate``: one video or image of a prompt, or of each prompt of a file, and what it cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapter import adapter_recipe, find_adapter, settings_of_adapter
from .against_dense import SideRun, compared, print_comparison
from .backend import refuse_backend
from .batch import Batch, Output, batch_folder
from .console import plain_console
from .errors import one_sentence_errors
from .options import (
    PROMPTS_FILE_HELP,
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    GraphsOption,
    GuidanceOption,
    ImportOption,
    JsonOption,
    LinearOption,
    ModelArgument,
    SetOption,
    SizeOption,
    StepsOption,
    VaeOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_prompt,
    read_prompts,
    read_recipe,
    read_seed,
    refuse_beside_attention,
)
from .output import free_name
from .processes import Processes
from .settings import Asked

if TYPE_CHECKING:
    import torch

    from ..patches.handle import PatchHandle
    from ..pipelines.generate import Generated


@one_sentence_errors
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option(help="What to generate.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", "--prompts-file", help=PROMPTS_FILE_HELP)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Of the noise; a file's prompts have one after another.")] = 0,
    recipe: Annotated[
        str,
        typer.Option(
            help="`auto`, `dense` for the model's own attention, a name from `dit-accel info`, or a .json file."
        ),
    ] = "auto",
    changes: SetOption = None,
    imports: ImportOption = None,
    calibration: Annotated[Path | None, typer.Option(help="A file of `dit-accel calibrate`.")] = None,
    rederive: Annotated[
        bool, typer.Option("--rederive", help="With --calibration: plan anew where the file has no plan, not fail.")
    ] = False,
    adapter: Annotated[
        str | None,
        typer.Option(help="A fine-tuned adapter in place of a recipe: a folder, or a name from `dit-accel info`."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="To start from, to edit, or a reference; may be repeated.")
    ] = None,
    last_image: Annotated[Path | None, typer.Option(help="The frame to end with.")] = None,
    mask: Annotated[Path | None, typer.Option(help="White where the image is made anew.")] = None,
    video: Annotated[Path | None, typer.Option(help="To make another video of.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Another of diffusers' pipelines over the same models.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(metavar="CLASS", help="Another of diffusers' schedulers.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="Hub id, folder or file; may be repeated, all are active together.")
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(metavar="model|sequential|group", help="Keep what does not run in the CPU's memory."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile of the transformer's blocks.")] = False,
    graphs: GraphsOption = False,
    linear: LinearOption = None,
    vae: VaeOption = None,
    backend: BackendOption = "auto",
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Also generate dense with the same seed, in turns, and compare.")
    ] = False,
    repeat: Annotated[
        int, typer.Option(min=1, help="With --compare-dense: timed runs of each side. From 2 on there is a spread.")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write (.mp4 or .png). Default: outputs/MODEL-SEED, or a free name. With --prompts: a folder."
        ),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate a video or an image from a prompt, accelerated, and say what ran."""
    quiet_libraries()
    import_modules(imports)
    asked, seed = Asked.read(size, frames, steps, guidance), read_seed(seed)
    prompts = _read_prompts(prompt, prompts_file, compare_dense)
    if negative_prompt is not None:
        negative_prompt = read_prompt(negative_prompt, "--negative-prompt")
    if adapter is not None and (recipe != "auto" or changes):
        raise ValueError(f"--adapter brings its own recipe, got --recipe {recipe} and {len(changes or ())} changes.")
    if adapter is not None and calibration is not None:
        raise ValueError(f"--adapter brings its own recipe and takes no calibration, got {calibration}.")
    if rederive and calibration is None:
        raise ValueError("--rederive goes with --calibration, got it alone.")
    if repeat > 1 and not compare_dense:
        raise ValueError(f"--repeat goes with --compare-dense, got --repeat {repeat} alone.")
    chosen = read_recipe(recipe, changes)
    target = read_device(device)
    processes = Processes.launched(target)
    if processes.number > 1 and prompts_file is None:
        raise ValueError(
            f"{processes.number} processes were started, which share a file of prompts: give --prompts, or start one."
        )
    target = processes.device(target)

    from ..pipelines.inputs import Inputs

    inputs = Inputs.read(image, last_image, mask, video)
    number = read_dtype(dtype, target)

    import torch

    from ..acceleration.api import change_beside_attention
    from ..api import patch
    from ..patches.artifact import CalibrationArtifact
    from ..pipelines.encode import refuse_missing_encoder
    from ..pipelines.generate import generate as run
    from ..pipelines.generate import makes_video, save, usual_suffix
    from ..pipelines.prepare import pipeline_class, prepared, refuse_offload
    from ..pipelines.unknown_words import note_on, unknown_words
    from ..plain_data import as_plain, digest
    from ..presets import automatic
    from ..quality.turns import measured_in_turns, steps_to_warm_up
    from ..training.adapter import load_adapter
    from .model import choose_model, open_model, will_make_video

    refuse_beside_attention(linear, vae, target)
    name, builtin = choose_model(model)
    folder = None if adapter is None else find_adapter(adapter, builtin)
    few_steps = {} if folder is None else settings_of_adapter(folder, None if compare_dense else asked)
    plans = None if calibration is None else CalibrationArtifact.load(calibration)
    refuse_backend(backend, number, target, adapter_recipe(folder) if folder else chosen or automatic())
    is_video = will_make_video(name, builtin) if pipeline is None else makes_video(pipeline_class(pipeline))
    batch = None
    if prompts_file is not None:
        what_decides = {
            "model": name,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "settings": vars(asked),
            "recipe": "auto" if chosen is None else chosen.to_dict(),
            "calibration": None if calibration is None else digest(calibration.read_bytes()),
            "rederive": rederive,
            "adapter": adapter,
            "inputs": vars(inputs),
            "pipeline": pipeline,
            "scheduler": scheduler,
            "lora": lora,
            "linear": linear,
            "vae": vae,
            "dtype": str(number).removeprefix("torch."),
        }
        batch = Batch(prompts, batch_folder(out, name, seed), seed, as_plain(what_decides), processes)

    def planned(is_video: bool) -> list[Output]:
        """What to write, which nothing but the disk will be in the way of."""
        if batch is None:
            return [Output(1, prompts[0], seed, _checked_path(out, name, seed, is_video, asked.frames, compare_dense))]
        if is_video:
            refuse_missing_encoder()
        return batch.claim(usual_suffix(is_video))

    def accelerated() -> PatchHandle:
        if folder is None:
            handle = patch(pipe, chosen, backend=backend, calibration=plans, rederive=rederive)
        else:
            handle = load_adapter(pipe, folder, backend=backend)
        try:
            change_beside_attention(handle, graphs=graphs, linear=linear, vae=vae)
        except BaseException:
            handle.remove()
            raise
        return handle

    def generated(output: Output, label: str, short: bool, own: Mapping[str, Any]) -> Generated:
        call = {**arguments, **own}
        if short:
            _say(f"Warming up: {label}", as_json)
            # A model of few steps runs them all.
            call["steps"] = call["steps"] if own else warm_up_steps
            return run(pipe, output.prompt, **call, seed=output.seed, inputs=more)
        with _progress(label, quiet=as_json) as advance:
            result = run(pipe, output.prompt, **call, seed=output.seed, inputs=more, progress=advance)
        if result.nan_values:
            print(
                f"Warning: {result.nan_values} pixel values are not finite and were made black.",
                file=sys.stderr,
            )
        return result

    def fast_side(output: Output, short: bool = False) -> SideRun:
        # Patched for this run alone: it keeps nothing of the warm-up or of another run.
        with accelerated() as handle:
            made = generated(output, "accelerated" if recipe != "dense" else "dense", short, few_steps)
            return SideRun(made, handle.summary(), handle.recipe)

    outputs = None if is_video is None else planned(is_video)
    if offload is not None:
        refuse_offload(offload, target)
    if batch is not None and outputs is not None and all(output.is_finished for output in outputs):
        _print_report(batch.make(outputs, fast_side, as_json), target, as_json and processes.is_first)
        return  # nothing is left to load a model for
    _, _, pipe = open_model(name, number, torch.device("cpu") if offload else target, quiet=as_json)
    pipe = prepared(pipe, pipeline, scheduler, lora or (), offload, compiled, target)
    for unknown in dict.fromkeys(note_on(unknown_words(pipe, one)) for one in prompts):
        if unknown:
            print(f"Note: {unknown}", file=sys.stderr)
    more = inputs.arguments(pipe)
    if outputs is None:
        outputs = planned(makes_video(pipe))
    arguments = {"negative_prompt": negative_prompt, **asked.settings(pipe, builtin)}
    with accelerated() as tried:  # what cannot be patched is refused before anything has run
        least = steps_to_warm_up(target.type, tried.recipe.schedule.few_steps)
    warm_up_steps = min(least, arguments.get("steps") or least)
    if batch is not None:
        _print_report(batch.make(outputs, fast_side, as_json), target, as_json and processes.is_first)
        return

    sides = {"accelerated": lambda short: fast_side(outputs[0], short)}
    if compare_dense:
        sides = {"dense": lambda short: SideRun(generated(outputs[0], "dense", short, {})), **sides}
    runs = measured_in_turns(sides, repeat, warm_up=compare_dense or target.type == "cuda")
    fast, summary, used = runs["accelerated"][0]
    assert summary is not None
    assert used is not None
    path = outputs[0].file
    files = {"out": str(save(fast, path))}
    if compare_dense:
        files["dense"] = str(save(runs["dense"][0].made, _dense_name(path)))
    report = {
        "model": name,
        "random_weights": bool(builtin and "RANDOM" in builtin.description),
        "prompt": prompts[0],
        "seed": seed,
        "settings": {**arguments, **few_steps, **_made(fast)},
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
    _print_report(report, target, as_json)
    if not as_json:
        _show(report, str(summary))


def _read_prompts(prompt: str | None, file: Path | None, compare_dense: bool) -> list[str]:
    """The one of ``--prompt``, or those of the file of ``--prompts``."""
    if (prompt is None) == (file is None):
        raise ValueError(f"Give --prompt or --prompts, got {'neither' if file is None else 'both'}.")
    if file is None:
        return [read_prompt(prompt or "")]
    if compare_dense:
        raise ValueError("--compare-dense goes with --prompt; `dit-accel compare` takes many prompts.")
    return read_prompts(None, file)


def _print_report(report: dict[str, Any], device: torch.device, as_json: bool) -> None:
    if as_json:
        from .environment import environment

        print(json.dumps({**report, **environment(device)}, indent=2))


def _checked_path(out: Path | None, name: str, seed: int, is_video: bool, frames: int | None, with_dense: bool) -> Path:
    """The file to write, which nothing but the disk will be in the way of."""
    from ..files import refuse_unwritable
    from ..pipelines.encode import refuse_missing_encoder
    from ..pipelines.generate import output_path

    beside = (lambda path: [_dense_name(path)]) if with_dense else (lambda _path: [])
    if out is None:
        default = Path("outputs") / f"{name.strip('./').replace('/', '--')}-{seed}"
        path = free_name(output_path(default, is_video), beside)
    else:
        path = output_path(out, is_video, frames)
    for file in (path, *beside(path)):
        refuse_unwritable(file)
    if is_video:
        refuse_missing_encoder()
    return path


def _dense_name(path: Path) -> Path:
    return path.with_name(f"{path.stem}.dense{path.suffix}")


def _made(result: Generated) -> dict[str, int]:
    """Size and frames that really came out."""
    frames, height, width, _ = result.frames.shape
    return {"width": width, "height": height, **({"frames": frames} if result.is_video else {})}


def _progress(label: str, quiet: bool) -> Any:
    """A bar on stderr, so that stdout holds the result alone; entering it gives the callback."""
    from contextlib import contextmanager, nullcontext

    if quiet:
        return nullcontext(None)

    @contextmanager
    def bar() -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:>11}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=plain_console(stderr=True)) as progress:
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
