"""``dit-accel search``: a density and an order per head from measured errors, as a recipe file."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated, Any

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
from .output import free_name
from .progress import progress_bar
from .settings import Asked
from .workload import Opened, Workload

if TYPE_CHECKING:
    from ..parts import Parts

DEFAULT = Path("outputs/found.json")
ADVICE = "give another file (--out), or start over (--start-over)"


@one_sentence_errors
def search(
    model: ModelArgument = None,
    recipe: Annotated[str, typer.Option(help="A recipe whose selection takes a density per head.")] = "pooled",
    changes: SetOption = None,
    imports: ImportOption = None,
    density: Annotated[float | None, typer.Option(help="Target: mean share of the blocks to keep.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Target, in place of a density: relative error of the velocity.")
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(help="An order that heads may choose: fhw, fwh, hfw, hwf, wfh, whf or tiles. May be repeated."),
    ] = None,
    rules: Annotated[
        bool, typer.Option("--rules", help="A static pattern for each head in place of a density; needs --density.")
    ] = False,
    transformer: Annotated[
        str | None, typer.Option(help="With --rules, of two experts the one to search: transformer or transformer_2.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Denoising steps of each prompt to measure heads at.")] = 3,
    prompt: PromptsOption = None,
    prompts_file: PromptsFileOption = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each further one adds 1.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help=f"The recipe file to write, *.json. Default: {DEFAULT}, or a free name.")
    ] = None,
    start_over: StartOverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what each head's sparsity does to the velocity, and share a budget of blocks out among heads.

    Interrupted, it goes on from what stands beside the file, which is gone when the file is written.
    """
    quiet_libraries()
    import_modules(imports)
    asked, seed = Asked.read(size, frames, steps, guidance), read_seed(seed)
    # The default is of the other kind of search.
    chosen = read_recipe("patterns" if rules and recipe == "pooled" else recipe, changes)
    if rules and (density is None or order):
        raise ValueError("--rules goes with --density and without --order: a pattern is in one order.")
    if transformer is not None and not rules:
        raise ValueError("--transformer goes with --rules.")
    if chosen is None:
        raise ValueError("--recipe auto has no selection to share out; name a recipe, such as pooled.")
    if (density is None) == (max_error is None):
        raise ValueError(f"--density or --max-error is the target, got {density} and {max_error}.")
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {str(out)!r}.")
    work = Workload.read(prompt, prompts_file, asked, device, dtype)

    from ..calibration.search import refuse_search
    from ..calibration.search import search as run
    from ..files import refuse_unwritable
    from ..parts import Parts

    if not rules:
        refuse_search(chosen, mean_density=density, max_error=max_error, orders=tuple(order or ()))
    path = out or free_name(DEFAULT)
    refuse_unwritable(path)
    parts = Parts(path.with_name(f"{path.name}.partial"), ADVICE)
    if start_over:
        parts.forget()
    opened = work.open(model, quiet=as_json)
    if rules:
        assert density is not None
        _search_rules(opened, chosen, density, transformer, samples, seed, path, parts, as_json)
        return
    with progress_bar("searching", quiet=as_json) as progress:
        found = run(
            opened.pipe,
            opened.prompts,
            chosen,
            mean_density=density,
            max_error=max_error,
            orders=tuple(order or ()),
            samples=samples,
            seed=seed,
            generate_kwargs=opened.arguments,
            parts=parts,
            progress=progress,
        )
    report: dict[str, Any] = {
        "model": opened.name,
        "recipe": found.recipe.to_dict(),
        "file": str(path),
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
    try:
        found.recipe.save(path)
    except ValueError:
        # All of the measurements, in place of the file.
        print(json.dumps({**report, "file": None}, indent=2))
        raise
    rmtree(parts.folder)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"density {found.density:.3f}; predicted error of the velocity {found.predicted_error:.4f},")
    print(f"with one density for all heads {found.predicted_uniform:.4f}")
    if order:
        print("heads by order: " + ", ".join(f"{key} {count}" for key, count in report["orders"].items()))
    print(f"{path}; use it with patch(pipe, {str(path)!r}) or --recipe {path}")


def _count(axes: tuple[tuple[str, ...], ...], name: str) -> int:
    return sum(layer.count(name) for layer in axes)


def _search_rules(
    opened: Opened,
    recipe: Any,
    density: float,
    transformer: str | None,
    samples: int,
    seed: int,
    path: Path,
    parts: Parts,
    as_json: bool,
) -> None:
    from ..calibration.patterns import search_rules

    with progress_bar("searching", quiet=as_json) as progress:
        found = search_rules(
            opened.pipe,
            opened.prompts,
            recipe,
            mean_density=density,
            transformer=transformer,
            samples=samples,
            seed=seed,
            generate_kwargs=opened.arguments,
            parts=parts,
            progress=progress,
        )
    found.recipe.save(path)
    rmtree(parts.folder)
    chosen = found.recipe.to_dict()["select"]["rules"]
    counts = {rule: _count(chosen, rule) for rule in found.errors.rules}
    report = {
        "recipe": found.recipe.to_dict(),
        "file": str(path),
        "density": found.density,
        "error": found.error,
        "best_single": found.best_single,
        "error_single": found.error_single,
        "heads": counts,
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    print(f"density {found.density:.3f}; error of a layer's output {found.error:.4f}")
    if found.best_single is not None:
        print(f"with {found.best_single!r} for all heads {found.error_single:.4f}")
    print("heads by rule: " + ", ".join(f"{rule} {count}" for rule, count in counts.items() if count))
    print(f"{path}; use it with patch(pipe, {str(path)!r}) or --recipe {path}")
