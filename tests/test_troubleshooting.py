"""The page on dense calls has each reason that the code can give, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_accel.patches.graphs.conditions import OF_INFERENCE
from dit_accel.patches.graphs.install import REPLACED
from dit_accel.patches.reasons import CACHED, NO_LATENTS, PASSED
from dit_accel.stages.schedule import DENSE_LAYER, DENSE_PHASE

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dit_accel"
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
# Functions that return reasons for dense calls, or None.
DENSE = {
    "engine.py": ("_dense_reason",),
    "worthwhile.py": ("why_not_worthwhile",),
    "planner.py": ("why_not_pairs",),
    "stages/schedule.py": ("dense_reason",),
    "call.py": ("_read_mask",),
    "patches/session.py": ("layout",),
    "patches/placement.py": ("place_latents",),
}
# Methods that count a dense call, whose argument may be the reason itself.
COUNTERS = ("pass_by", "count_dense", "_run_dense", "_pass_by")
REUSE = {"patches/reuse/tracker.py": ("_why_not",)} | {
    str(path.relative_to(PACKAGE)): ("not_at",) for path in sorted((PACKAGE / "stages" / "reuse").glob("*.py"))
}


def texts(node: ast.AST) -> Iterator[str]:
    """The texts that an expression may have, with a * for each value filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.Tuple):
        for part in node.elts:
            yield from texts(part)


def returned(source: str, functions: tuple[str, ...]) -> Iterator[str]:
    """What functions return or call their reason or layout."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for node in ast.walk(function):
                named = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("reason", "layout")
                if isinstance(node, (ast.Return, ast.Assign)) and node.value is not None:
                    yield from texts(node.value) if named or isinstance(node, ast.Return) else ()


def counted(source: str) -> Iterator[str]:
    """Texts that are given to what counts dense calls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in COUNTERS:
            for argument in node.args:
                yield from texts(argument)


def in_code(places: dict[str, tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    for path, functions in places.items():
        found |= set(returned((PACKAGE / path).read_text(encoding="utf-8"), functions))
    return found


def dense_reasons() -> set[str]:
    """All of them; what passes a layer by in compiled code is a list already."""
    everywhere = {text for path in PACKAGE.rglob("*.py") for text in counted(path.read_text(encoding="utf-8"))}
    return in_code(DENSE) | everywhere | (set(PASSED) - {CACHED}) | {NO_LATENTS, DENSE_PHASE, DENSE_LAYER}


def graph_reasons() -> set[str]:
    """Why blocks run without graphs: what functions return, what is raised, and what has a name."""
    folder = PACKAGE / "patches" / "graphs"
    found = {OF_INFERENCE, REPLACED, "samples are attended one by one"}
    for path, function in (("conditions.py", "why_not_now"), ("install.py", "why_never"), ("served.py", "of")):
        found |= set(returned((folder / path).read_text(encoding="utf-8"), (function,)))
    found |= set(returned((PACKAGE / "planner.py").read_text(encoding="utf-8"), ("why_not_of_one_call",)))
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "CannotCapture":
                found |= set(texts(node.args[0]))
    return found - {""}


def of_page(*headings: str) -> list[str]:
    """First cells of the tables below headings."""
    sections = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
    return [row for name in headings for row in re.findall(r"^\| `(.+?)` \|", sections[name], re.MULTILINE)]


def as_written(reason: str) -> str:
    """The page has N and M for what is filled in, which may be several in a row."""
    return re.sub(r"\\\*", "[NM]", re.escape(reason))


HEADINGS = ("The recipe says so", "Too little to gain", "The call cannot be read", "The latents are not found")


@pytest.mark.parametrize(
    ("reasons", "rows"),
    [
        (dense_reasons(), of_page(*HEADINGS)),
        (in_code(REUSE), of_page("Nothing is reused across steps")),
        (graph_reasons(), of_page("Blocks run without CUDA graphs")),
    ],
    ids=["dense", "reuse", "graphs"],
)
def test_the_page_has_each_reason(reasons: set[str], rows: list[str]) -> None:
    assert len(reasons) >= 5
    missing = {reason for reason in reasons if not any(re.fullmatch(as_written(reason), row) for row in rows)}
    assert missing == set()
    gone = {row for row in rows if not any(re.fullmatch(as_written(reason), row) for reason in reasons)}
    assert gone == set()
    assert len(rows) == len(set(rows)) == len(reasons)


def test_every_table_of_reasons_is_read() -> None:
    assert PAGE.count("\n| `") == len(
        of_page(*HEADINGS, "Nothing is reused across steps", "Blocks run without CUDA graphs")
    )
    assert f"`{CACHED}`" in PAGE


def test_reasons_are_found_where_they_are_made() -> None:
    source = """
def why(self, x):
    if x:
        return "a" if x > 1 else f"{x} of {self.y} b"
    layout = "c"
    self.engine.pass_by(0, "d", None)
    return None, None, f"e {x}"
"""
    assert set(returned(source, ("why",))) == {"a", "* of * b", "c", "e *"}
    assert list(counted(source)) == ["d"]
    assert set(returned(source, ("other",))) == set()
