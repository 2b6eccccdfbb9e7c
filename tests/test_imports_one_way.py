"""Imports point one way: a room imports rooms below it, never above, never beside."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dit_accel"

# From the ground up. Rooms in one line do not import each other.
FLOORS = (
    ("files", "heads", "layout", "names", "plain_data", "process_group", "ring"),
    ("parts", "ring_sums", "tensor_files"),
    ("kernels.common",),
    ("kernels.mask",),
    ("kernels.attention", "kernels.selection"),
    ("kernels.linear", "kernels.quantized", "kernels.pyramid", "kernels.coarse"),
    ("kernels",),
    ("plan", "timing", "records", "graph_hold", "worthwhile"),
    ("run",),
    ("call", "step_log"),
    ("ring_attention",),
    ("stages",),
    ("recipe", "kept_plans"),
    ("presets",),
    ("extending",),
    ("layout_tables",),
    ("dense_kernel",),
    ("planner",),
    ("kept_attention",),
    ("engine", "frozen_planner"),
    ("patches",),
    ("api", "runner"),
    ("acceleration", "attention_backend", "vllm_omni"),
    ("pipelines",),
    ("calibration", "training"),
    ("quality",),
    ("benchmarking", "tuning", "ui"),
    ("cli",),
)
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room of a module named without the package; None for the package itself."""
    parts = module.split(".")
    for length in (2, 1):
        if ".".join(parts[:length]) in HEIGHT:
            return ".".join(parts[:length])
    return None


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module, without the package's name, of every import of this package, also inside functions."""
    here = list(path.relative_to(PACKAGE).with_suffix("").parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in only_for_types:
            base = here[: len(here) - node.level]
            names = [alias.name for alias in node.names] if node.module is None else [node.module]
            for name in names:
                if name == "__version__":
                    continue
                yield node.lineno, ".".join([*base, name])


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    room = room_of(module)
    assert room is not None, f"{module} stands in no room: name its floor"
    for line, target in imports_of(path):
        other = room_of(target)
        assert other is not None, f"{path}:{line} imports {target}, which stands in no room"
        assert other == room or HEIGHT[other] < HEIGHT[room], f"{path}:{line}: {room} imports {other}"
