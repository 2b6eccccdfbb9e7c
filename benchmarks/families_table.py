"""The tables of docs/families.md and of the README: what can be patched, and which of diffusers' pipelines run it.

    python benchmarks/families_table.py [--check]

Families and classes are those of the registry. Pipelines are those of the installed diffusers whose constructors name
the class. ``--check`` writes nothing, and exits with 1 where the file says something else.
"""

from __future__ import annotations

import argparse
import inspect
import re
import typing
from collections import defaultdict
from pathlib import Path

import diffusers

from dit_accel.patches.families import CONTROLS, EXCLUDED, FAMILIES

# The oldest diffusers that pyproject.toml allows, and the classes of the registry that it lacks; .ci/run tests with it.
OLDEST = "0.36"
NEWER = frozenset(
    (
        "AnyFlowTransformer3DModel",
        "BriaFibo2Transformer2DModel",
        "Cosmos3OmniTransformer",
        "ErnieImageTransformer2DModel",
        "Flux3Transformer2DModel",
        "GlmImageTransformer2DModel",
        "HeliosTransformer3DModel",
        "Ideogram4Transformer2DModel",
        "JoyImageEditPlusTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Kandinsky6Transformer3DModel",
        "Krea2Transformer2DModel",
        "LTX2VideoTransformer3DModel",
        "LongCatImageTransformer2DModel",
        "MiniMaxH3Transformer3DModel",
        "MotifVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "QwenImage21Transformer2DModel",
    )
)
ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "families.md", ROOT / "README.md"
BEGIN, END = "<!-- table: benchmarks/families_table.py -->\n", "<!-- end of table -->\n"


def pipelines() -> dict[str, list[str]]:
    """Names of diffusers' pipelines, without the word Pipeline, by the transformer classes of their constructors."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(dir(diffusers)):
        if not name.endswith("Pipeline") or name in ("DiffusionPipeline", "ModularPipeline"):
            continue
        kind = getattr(diffusers, name)
        for parameter in inspect.signature(kind.__init__).parameters.values():
            if parameter.name.startswith("transformer"):
                hint = parameter.annotation
                classes = typing.get_args(hint) or (hint,)
                for one in classes:
                    label = one if isinstance(one, str) else getattr(one, "__name__", "")
                    for word in re.findall(r"\w+", label):
                        if name.removesuffix("Pipeline") not in found[word]:
                            found[word].append(name.removesuffix("Pipeline"))
    return found


def table() -> str:
    """Markdown, a row for each class."""
    known = pipelines()
    lines = [f"With diffusers {diffusers.__version__}:", ""]
    lines += [
        "| family | transformer | pipelines | several GPUs | default sparse from | tested with |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for kind in family.transformers:
            names = ", ".join(known.get(kind, [])) or "modular"
            versions = diffusers.__version__ if kind in NEWER else f"{OLDEST}, {diffusers.__version__}"
            # Of a model without a plan diffusers splits no sequence.
            planned = bool(getattr(getattr(diffusers, kind), "_cp_plan", None))
            shared = "Ulysses" if planned else "-"
            lines.append(
                f"| {family.name} | `{kind}` | {names} | {shared} | {family.min_tokens:,} tokens | {versions} |"
            )
    lines += ["", "Control networks:", "", "| family | network |", "|---|---|"]
    lines += [f"| {family.name} | `{kind}` |" for family in CONTROLS for kind in family.transformers]
    lines += ["", "Left alone, and why:", "", "| transformer | reason |", "|---|---|"]
    lines += [f"| `{kind}` | {reason} |" for kind, reason in EXCLUDED.items()]
    return "\n".join(lines) + "\n"


def short_table() -> str:
    """Markdown, the families alone, in the registry's order: videos first."""
    names = [family.name for family in FAMILIES]
    first_image = names.index("FLUX.1")
    videos, images = names[:first_image], names[first_image:]
    return f"| makes | families |\n|---|---|\n| videos | {', '.join(videos)} |\n| images | {', '.join(images)} |\n"


def page(text: str, now: str | None = None) -> str:
    """The page with its table as it is now."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + (table() if now is None else now) + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    for file, made in ((PAGE, table()), (README, short_table())):
        text = file.read_text(encoding="utf-8")
        now = page(text, made)
        if asked.check and now != text:
            raise SystemExit(f"{file.name} is not what the registry says: run this script.")
        if not asked.check:
            file.write_text(now, encoding="utf-8")


if __name__ == "__main__":
    main()
