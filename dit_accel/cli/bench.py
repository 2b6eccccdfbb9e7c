"""``dit-accel bench``: a real architecture, dense against patched."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import refuse_unwritable, write_text
from .console import plain_console
from .errors import one_sentence_errors
from .options import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    ImportOption,
    JsonOption,
    SetOption,
    SizeOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_recipe,
    read_size,
)


@one_sentence_errors
def bench(
    arch: Annotated[str, typer.Option(help="Architecture; see `dit-accel info`.")] = "wan2.1-1.3b",
    size: SizeOption = None,
    frames: FramesOption = None,
    layers: Annotated[int | None, typer.Option(help="Blocks to keep. Default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Samples in a forward; 2 is a batched guidance pair.")] = 1,
    recipe: Annotated[str, typer.Option(help="A name from `dit-accel info`, or `auto`.")] = "pooled",
    changes: SetOption = None,
    imports: ImportOption = None,
    backend: BackendOption = "auto",
    dense_backend: Annotated[
        str | None, typer.Option(help="Dense attention, by diffusers' name. Default: the fastest that runs.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Measured forwards, or runs, of each variant. Default: 5 forwards or 1 run.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the repeated blocks of both variants.")
    ] = False,
    pipeline: Annotated[
        bool, typer.Option("--pipeline", help="Time a whole run instead: text, all steps, decoding.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="With --pipeline: denoising steps. Default: 30.")] = None,
    dense_steps: Annotated[
        int | None, typer.Option(help="With --pipeline: measured steps of the dense side, which are all alike.")
    ] = None,
    graphs: Annotated[
        bool, typer.Option("--graphs", help="With --pipeline: as `dit-accel generate --graphs`.")
    ] = False,
    linear: Annotated[
        str | None, typer.Option(metavar="fp8|int8", help="With --pipeline: the fast side's linear layers in 8 bits.")
    ] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="SETTINGS", help="With --pipeline: as `dit-accel generate --vae`.")
    ] = None,
    context_parallel: Annotated[
        int | None,
        typer.Option("--context-parallel", metavar="N", help="Share a forward out among N processes, by torchrun."),
    ] = None,
    ring: Annotated[
        int | None, typer.Option(help="With --context-parallel: processes around a ring. Default: 1, Ulysses alone.")
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="Tune the attention kernels for this GPU instead; --out is then the table."),
    ] = False,
    seconds: Annotated[
        float | None, typer.Option(help="With --kernels: leave out what is not measured by then, about.")
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time one transformer forward, or a whole run, with random weights, dense and patched, in turns."""
    quiet_libraries()
    import_modules(imports)
    given = {
        "--steps": steps, "--dense-steps": dense_steps, "--graphs": graphs or None, "--linear": linear, "--vae": vae,
    }  # fmt: skip
    alone = [flag for flag, value in given.items() if value is not None]
    if alone and not pipeline:
        raise ValueError(f"{alone[0]} goes with --pipeline, got it without.")
    if ring is not None and context_parallel is None:
        raise ValueError("--ring goes with --context-parallel, got it without.")
    if context_parallel is not None and (pipeline or kernels):
        raise ValueError(
            f"--context-parallel times a forward, and does not go with {'--pipeline' if pipeline else '--kernels'}."
        )
    if out is not None:
        refuse_unwritable(out)
    if kernels:
        _tune(read_device(device), out, as_json, seconds)
        return
    from ..pipelines.architectures import architecture

    known = architecture(arch)
    default_width, default_height, default_frames = known.size
    width, height = read_size(size) if size else (default_width, default_height)
    length = frames if frames is not None else default_frames
    chosen = read_recipe(recipe, changes)
    target = read_device(device)
    number = read_dtype(dtype, target)

    facts = {
        "arch": arch,
        "width": width,
        "height": height,
        "frames": length,
        "latent_tokens": known.tokens(width, height, length),
        "layers": layers or known.blocks,
        "of_layers": known.blocks,
        "batch": batch,
        "dtype": str(number).removeprefix("torch."),
        "compiled": compiled,
        **({"graphs": True} if graphs else {}),
        "recipe": chosen.to_dict() if chosen is not None else "auto",
    }
    if context_parallel is not None:
        from ..benchmarking.context_parallel import Shared, bench_shared
        from .bench_shared import degrees, show_shared

        around, heads = degrees(context_parallel, ring)
        among = Shared(
            arch,
            width,
            height,
            length,
            around,
            heads,
            None if chosen is None else chosen.to_dict(),
            str(number).removeprefix("torch."),
            target.type,
            batch,
            layers,
            5 if repeats is None else repeats,
            backend,
            dense_backend or ("native" if target.type == "cpu" else "_native_cudnn"),
            compiled,
        )
        _give_out({**facts, **bench_shared(among)}, target, out, as_json, show_shared)
        return
    # What a forward and a whole run are measured under alike.
    shared: dict[str, Any] = {
        "width": width,
        "height": height,
        "frames": length,
        "recipe": chosen,
        "dtype": number,
        "device": target,
        "layers": layers,
        "backend": backend,
        "dense_backend": dense_backend,
        "compiler": "inductor" if compiled else None,
    }
    if pipeline:
        if batch != 1:
            raise ValueError(f"--pipeline runs one clip, got --batch {batch}.")
        from ..benchmarking.whole_run import bench_run
        from .bench_run import show_run

        with _status(quiet=as_json) as progress:
            run = bench_run(
                known,
                **shared,
                num_steps=30 if steps is None else steps,
                dense_steps=dense_steps,
                repeats=1 if repeats is None else repeats,
                graphs=graphs,
                linear=linear,
                vae=vae,
                progress=progress,
            )
        _give_out({**facts, **run.to_dict()}, target, out, as_json, show_run)
        return

    from ..benchmarking.forward import bench_forward

    with _status(quiet=as_json) as progress:
        report = bench_forward(
            known, **shared, batch=batch, repeats=5 if repeats is None else repeats, progress=progress
        )
    _give_out({**facts, **report.to_dict()}, target, out, as_json, _show)


def _give_out(
    facts: dict[str, Any], device: Any, out: Path | None, as_json: bool, show: Callable[[dict[str, Any]], None]
) -> None:
    """Write and print what was found; values that are not finite are an error."""
    from .environment import environment

    data = {**facts, **environment(device)}
    if out is not None:
        write_text(out, json.dumps(data, indent=1) + "\n")
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        show(data)
    if not data["finite"]:
        print("Error: an output holds values that are not finite.", file=sys.stderr)
        raise typer.Exit(2)


def _tune(device: Any, out: Path | None, as_json: bool, seconds: float | None) -> None:
    """Measure launch configurations, print them, and write the table to ``out``."""
    from ..kernels.attention.tune import default_workers, tune
    from ..kernels.attention.tuning import TABLE_VARIABLE
    from .environment import environment

    if device.type != "cuda":
        raise RuntimeError(f"bench --kernels needs a CUDA GPU, got {device.type}.")
    with _status(quiet=as_json) as progress:
        measured = tune(device, progress=progress, workers=default_workers(), seconds=seconds or math.inf)
        table = {**measured, "environment": environment(device)}
    if out is not None:
        write_text(out, json.dumps(table, indent=1) + "\n")
    if as_json:
        print(json.dumps(table, indent=2))
        return
    from rich.table import Table

    console, shown = plain_console(), Table("kernel", "warps", "stages", "ms", show_edge=False)
    for key, (warps, stages) in table["entries"].items():
        ms = min(row["ms"] for row in table["measured"] if row["entry"] == key and "ms" in row and "warps" in row)
        shown.add_row(key, str(warps), str(stages), f"{ms:.3f}")
    console.print(shown)
    for key in table["fa4_fastest"]:
        console.print(f"flash-attn-4 is faster: {key}")
    if out is not None:
        print(f"to use it: export {TABLE_VARIABLE}={out}")


def _status(quiet: bool) -> Any:
    """What is going on, on stderr; entering it gives the function to tell."""
    from contextlib import contextmanager, nullcontext

    if quiet:
        return nullcontext(lambda _stage: None)

    @contextmanager
    def status() -> Any:
        with plain_console(stderr=True).status("starting") as spinner:
            yield spinner.update

    return status()


def _show(data: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = plain_console()
    device = data["device"]["name"]
    console.print(
        Text(data["arch"], style="bold"),
        f"{data['width']}x{data['height']}, {data['frames']} frames, "
        f"{data['latent_tokens']} latent tokens, {data['layers']} of {data['of_layers']} layers, batch "
        f"{data['batch']}, {data['dtype']}, {'compiled' if data['compiled'] else 'eager'}, on {device}",
    )
    table = Table("forward", "median", "fastest", "slowest", "peak memory", show_edge=False)
    for name in ("dense", "patched"):
        timing = data[name]
        memory = timing["peak_memory_gib"]
        table.add_row(
            f"dense ({data['dense_backend']})" if name == "dense" else name,
            *(f"{timing[key] * 1000:.1f} ms" for key in ("median_s", "min_s", "max_s")),
            "-" if memory is None else f"{memory:.2f} GiB",
        )
    console.print(table)
    attention = data["attention_per_forward"]
    density = "-" if data["density"] is None else f"{data['density']:.4f}"
    mean = "-" if data["mean_density"] is None else f"{data['mean_density']:.4f}"
    low, high = data["speedup_range"]
    runs = len(data["dense"]["seconds"])
    spread = f" ({low:.2f}x to {high:.2f}x over {runs} of each, in turns)" if runs > 1 else " (one of each: no spread)"
    console.print(f"speed-up {data['speedup']:.2f}x{spread} at density {density} (all calls {mean})")
    console.print(
        f"per patched forward: sparse attention {attention['sparse_s'] * 1000:.1f} ms, dense attention "
        f"{attention['dense_s'] * 1000:.1f} ms, planning {attention['plan_s'] * 1000:.1f} ms "
        f"({attention['plan_share_of_forward']:.1%} of the forward)",
    )
    console.print(
        f"output: relative difference to dense {data['relative_difference']:.3g} (weights are random), "
        f"{'finite' if data['finite'] else 'NOT finite'}",
    )
    from ..records import backend_lines

    for line in backend_lines(data["summary"]["backends"]):
        console.print(line)
    for name, seconds in data["dense_candidates"].items():
        spelled = seconds if isinstance(seconds, str) else f"{seconds * 1000:.1f} ms in a one-block model"
        console.print(f"dense candidate {name}: {spelled}")
    for note in data["notes"]:
        console.print(f"note: {note}")
