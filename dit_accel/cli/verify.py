"""``dit-accel verify``: what accelerating a model gives here, as a card that can be sent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .comparison import Comparison
from .errors import one_sentence_errors
from .options import (
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
    PromptsFileOption,
    SizeOption,
    StartOverOption,
    StepsOption,
    VaeOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_prompts,
    read_recipe,
    read_seed,
    refuse_beside_attention,
)
from .settings import Asked

if TYPE_CHECKING:
    from ..quality.results import ComparisonReport
    from ..recipe import Recipe

DEFAULT = Path("outputs/verify")


@one_sentence_errors
def verify(
    model: ModelArgument = None,
    profiles: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="Profiles and presets to run, by comma; `none` for none.")
    ] = "balanced,fast",
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "--recipes", metavar="RECIPE", help="Further recipe; may be repeated."),
    ] = None,
    imports: ImportOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: 16 prompts.")] = None,
    prompts_file: PromptsFileOption = None,
    count: Annotated[int | None, typer.Option(min=1, help="Use the first prompts only.")] = None,
    seed: Annotated[int, typer.Option(help="The first seed of every prompt.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every prompt.")] = 1,
    size: SizeOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile of the transformer's blocks, of dense runs too.")
    ] = False,
    graphs: GraphsOption = False,
    linear: LinearOption = None,
    vae: VaeOption = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each clip, dense and under each recipe.")] = 1,
    metrics: Annotated[str | None, typer.Option(help="Names, by comma. Default: all that run.")] = None,
    note: Annotated[str | None, typer.Option(help="For the card, such as what else runs on the machine.")] = None,
    pictures: Annotated[bool, typer.Option("--pictures", help="Keep the clips, and show them on the page.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder, which a second run goes on in. Default: {DEFAULT}, or a free name."),
    ] = None,
    start_over: StartOverOption = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run a model dense and accelerated, in turns, and write a card: seconds, fidelity, what ran; JSON and a page.

    Seconds and decibels are of the same runs. Interrupted, it leaves a card of the clips so far, and can go on.
    """
    quiet_libraries()
    import_modules(imports)
    asked, seed = Asked.read(size, frames, steps, guidance), read_seed(seed)
    prompts = read_prompts(prompt, prompts_file)
    target = read_device(device)
    number = read_dtype(dtype, target)
    refuse_beside_attention(linear, vae, target)
    recipes = _read_recipes(profiles, recipe or ())

    from ..quality.card import FILE, read_card
    from ..quality.prompts import DEFAULT_PROMPTS
    from .model import choose_model, open_model

    comparison = Comparison(
        choose_model(model)[0],
        recipes,
        (prompts or DEFAULT_PROMPTS)[:count],
        range(seed, read_seed(seed + seeds - 1) + 1),
        asked,
        number,
        target,
        metrics.split(",") if metrics else None,
        repeat,
        pictures,
        compiled,
        graphs,
        linear,
        vae,
    )
    parts = comparison.claim(out, DEFAULT, start_over)
    path = parts.folder / FILE
    finished = comparison.finished(parts) is not None and path.exists()
    card = read_card(path) if finished else {}
    # One of a run that was killed may lack its last clip.
    if card.get("clips") != comparison.clips:
        _, builtin, pipe = open_model(model, number, target, quiet=as_json)
        card = _made(comparison, pipe, builtin, parts, note or "")
    if as_json:
        print(json.dumps(card, indent=1, ensure_ascii=False))
        return
    _show(card, parts.folder)


def _read_recipes(profiles: str, recipes: Sequence[str]) -> dict[str, Recipe | None]:
    """Recipes by their text; what ``patch(pipe)`` does is ``auto``."""
    names = [] if profiles == "none" else [name.strip() for name in profiles.split(",")]
    texts = [*names, *recipes]
    if not texts or len(set(texts)) != len(texts):
        raise ValueError(f"--profiles and --recipe must name one recipe at least, each once, got {', '.join(texts)!r}.")
    return {"dense (patched)" if text == "dense" else text: read_recipe(text, None) for text in texts}


def _made(comparison: Comparison, pipe: Any, builtin: Any, parts: Any, note: str) -> dict[str, Any]:
    """The card of the runs that are missing, and of those that are there."""
    from ..plain_data import as_plain
    from ..presets.spelling import short_line
    from ..quality.card import make_card, write_card
    from ..quality.sequence import first_sequence
    from ..quality.turns import LONG_WARM_UP_STEPS
    from .environment import environment

    arguments = comparison.arguments(pipe, builtin)
    sequence = first_sequence(pipe, comparison.prompts[0], arguments)

    def written(report: ComparisonReport) -> dict[str, Any]:
        card = make_card(
            report,
            environment=environment(comparison.device),
            settings={
                "dtype": str(comparison.dtype).removeprefix("torch."),
                "compiled": comparison.compiled,
                "graphs": comparison.graphs,
                "linear": comparison.linear,
                "vae": comparison.vae,
                "call": as_plain(arguments),
            },
            recipes={name: "auto" if one is None else short_line(one) for name, one in comparison.recipes.items()},
            sequence=sequence,
            random_weights=bool(builtin and "RANDOM" in builtin.description),
            note=note,
        )
        write_card(card, parts.folder)
        return card

    # Attention is not timed: of every run the stages are.
    options: dict[str, Any] = {"dense_attention_clips": 0, "warm_up_steps": LONG_WARM_UP_STEPS}
    return written(comparison.run(pipe, builtin, parts, on_report=written, **options))


def _show(card: dict[str, Any], folder: Path) -> None:
    from rich.table import Table

    from ..quality.card import FILE, ROW, run_of
    from .console import plain_console

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for title in ("seconds", "text", "steps", "decoding", "times", "PSNR", "density"):
        table.add_column(title, justify="right", no_wrap=True)
    for side in (*card["recipes"], card["dense"]):
        psnr, density, stages = side["metrics"].get("psnr"), side["density"], side["stages"]
        table.add_row(
            side["recipe"],
            f"{side['total_seconds']['median']:.2f}",
            *(f"{stages[name]['median']:.2f}" if stages else "-" for name in ("text", "steps", "decode")),
            f"{side['speedup']['median']:.2f}x",
            "-" if psnr is None else f"{float(psnr['mean']):.2f}",
            "-" if density is None else f"{density['mean']:.3f}",
        )
    print(f"{card['model']}, {run_of(card)}, on {card['device']['name']}")
    plain_console().print(table)
    if card["random_weights"]:
        print("The weights are random: the times are real, fidelity means nothing.")
    for line in card["notes"]:
        print(f"note: {line}")
    print(f"{folder / FILE} is the card, {folder / ROW} its rows for a table, {folder / 'index.html'} the page.")
