"""``dit-accel info``: what this machine can run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import plain_console
from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    ImportOption,
    JsonOption,
    import_modules,
    quiet_libraries,
    read_device,
)

if TYPE_CHECKING:
    import torch
    from rich.table import Table


@one_sentence_errors
def info(
    imports: ImportOption = None,
    device: DeviceOption = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Also each family's classes, each recipe's options, and the fields for --set."),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show device, versions, backends with reasons, model families, recipes and built-in models."""
    quiet_libraries()
    import_modules(imports)
    data = collect(read_device(device))
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        _show(data, everything)


def collect(device: torch.device) -> dict[str, Any]:
    """Everything the command shows, as plain data."""
    from ..kernels.common.support import support
    from ..patches.families import FAMILIES, registered
    from ..pipelines.architectures import ARCHITECTURES
    from ..pipelines.builtin import builtins
    from ..presets import NAMES
    from .environment import environment

    return {
        **environment(device),
        "support": support(device),
        "backends": _backends(device),
        "operations": _operations(device),
        "families": [
            {
                "name": family.name,
                "transformers": list(family.transformers),
                "auto_dense_below_tokens": family.min_tokens,
            }
            for family in (*registered(), *FAMILIES)
        ],
        "recipes": [_recipe(name, NAMES.get(name)) for name in NAMES],
        "axes": _axes(),
        "models": [
            {"name": b.name, "description": b.description, "adapters": list(b.adapters)} for b in builtins().values()
        ],
        "architectures": [
            {"name": a.name, "transformer": a.transformer, "blocks": a.blocks, "size": list(a.size)}
            for a in ARCHITECTURES.values()
        ],
    }


def _backends(device: torch.device) -> list[dict[str, Any]]:
    """Which backends run plain attention here, asked of the very predicates that choose them."""
    import torch

    from ..kernels import BACKENDS, BlockMask, choose_backend

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.zeros(1, 128, 1, 128, dtype=dtype, device=device)
    mask = BlockMask.from_dense(
        torch.ones(1, 1, 1, 2, dtype=torch.bool, device=device),
        block_q=128,
        block_k=64,
        q_len=128,
        kv_len=128,
    )
    rows = []
    for name in BACKENDS:
        try:
            chosen, reason = choose_backend(q, q, q, mask, backend=name)
        except ValueError as error:
            rows.append({"name": name, "available": False, "reason": str(error)})
            continue
        rows.append(
            {
                "name": name,
                "available": True,
                "reason": f"{chosen} ({reason})" if name == "auto" else "",
            }
        )
    return rows


def _operations(device: torch.device) -> list[dict[str, str]]:
    """What runs the other operations of a plain call here, where no backend is named."""
    import torch

    from ..kernels.common.capability import choose_selection
    from ..kernels.common.choice import Case, Choice, spelled
    from ..kernels.linear.api import choose_linear
    from ..kernels.pyramid.api import choose_pyramid
    from ..kernels.quantized.api import choose_quantized
    from ..kernels.selection.block_mass import choose_block_mass
    from ..kernels.selection.gate import choose_gate
    from ..kernels.selection.rectified import choose_rectified

    case = Case(device, torch.bfloat16 if device.type == "cuda" else torch.float32, 128, (128, 64))
    choices: dict[str, Choice] = {
        "selection": choose_selection(case),
        "gate": choose_gate(case),
        "block_mass": choose_block_mass(case),
        "pyramid": choose_pyramid(case),
        "rectified": choose_rectified(case),
        "linear_branch": choose_linear(case, "softmax"),
        "quantized_attention": choose_quantized(case, "int8"),
    }
    return [
        {"name": spelled(name), "backend": choice.name, "reason": choice.reason} for name, choice in choices.items()
    ]


def _recipe(name: str, preset: Any) -> dict[str, Any]:
    return {
        "name": name,
        "description": (inspect.getdoc(preset) or "").split("\n\n")[0].replace("\n", " "),
        "options": {option: parameter.default for option, parameter in inspect.signature(preset).parameters.items()},
        "recipe": preset().to_dict(),
    }


def _axes() -> dict[str, dict[str, dict[str, Any]]]:
    """Fields of every kind on every axis, with defaults: what ``--set`` takes."""
    from dataclasses import asdict

    from ..recipe import AXES, kinds_of

    return {axis: {name: asdict(kind()) for name, kind in kinds_of(axis).items()} for axis in AXES}


def _show(data: dict[str, Any], everything: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..pipelines.companion import NAMES, absent, find_folder

    console = plain_console()

    def line(title: str, text: str) -> None:
        console.print(Text(title, style="bold"), text)

    def table(title: str, *columns: str) -> Table:
        return Table(*columns, title=title, title_justify="left", title_style="bold", show_edge=False)

    device = data["device"]
    line("Device", f"{device['name']} ({', '.join(f'{k} {v}' for k, v in device.items())})")
    line("Kernels", data["support"])
    line("Versions", ", ".join(f"{k} {v}" for k, v in data["versions"].items()))
    backends = table("Backends of attention", "name", "runs here", "reason")
    for row in data["backends"]:
        backends.add_row(row["name"], "yes" if row["available"] else "no", row["reason"])
    operations = table("Other operations", "name", "backend", "reason")
    for row in data["operations"]:
        operations.add_row(row["name"], row["backend"], row["reason"])
    models = table("Built-in models", "name", "what it is", "adapters")
    for row in data["models"]:
        models.add_row(row["name"], row["description"], ", ".join(row["adapters"]) or "-")
    if find_folder(NAMES[0]) is None:
        models.caption = absent(f"The model {NAMES[0]!r}")
    details = _details(data, table) if everything else ()
    for part in (backends, operations, *details, models):
        console.print()
        console.print(part)
    if not everything:
        console.print()
        for title, key in (("Families", "families"), ("Recipes", "recipes"), ("Architectures", "architectures")):
            line(title, ", ".join(row["name"] for row in data[key]))
        console.print("\n`dit-accel info --all` has their classes, options and sizes, and the fields for --set.")


def _details(data: dict[str, Any], table: Callable[..., Table]) -> Iterator[Table]:
    """Hundreds of lines: each family, recipe, field and architecture."""
    families = table("Model families (auto is sparse on a GPU from so many tokens on)", "name")
    families.add_column("transformer", no_wrap=True)
    families.add_column("tokens", justify="right")
    for row in data["families"]:
        families.add_row(row["name"], "\n".join(row["transformers"]), str(row["auto_dense_below_tokens"]))
    yield families
    recipes = table("Recipes", "name", "options", "what it does")
    for row in data["recipes"]:
        options = "\n".join(f"{name}={value}" for name, value in row["options"].items())
        recipes.add_row(row["name"], options or "-", row["description"])
    yield recipes
    fields = table("Fields for --set", "axis", "kind", "fields")
    for axis, kinds in data["axes"].items():
        for kind, values in kinds.items():
            text = "\n".join(f"{axis}.{name}={value}" for name, value in values.items())
            fields.add_row(axis, kind, text or "-")
    yield fields
    architectures = table("Architectures for bench", "name", "blocks", "default size")
    for row in data["architectures"]:
        width, height, frames = row["size"]
        architectures.add_row(row["name"], str(row["blocks"]), f"{width}x{height}, {frames} frames")
    yield architectures
