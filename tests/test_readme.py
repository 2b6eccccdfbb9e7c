"""The README: short, few figures, no dead link, and code that runs; so does the code of the pages that begin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_accel
from benchmarks.families_table import README as README_FILE
from benchmarks.families_table import page, short_table
from dit_accel.pipelines.call_defaults import WanPipeline
from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.pipelines.settings import Settings

ROOT = Path(__file__).parent.parent
README = README_FILE.read_text(encoding="utf-8")
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/quickstart.md",
    "docs/choosing.md",
    "docs/whole_runs.md",
    "docs/hosts.md",
    "docs/steps.md",
)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def prose_of(markdown: str) -> list[str]:
    """The words that a reader reads: without code, tables, pictures, comments and the targets of links."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->|!\[[^]]*\]\([^)]*\)", "", text)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return [word for word in text.split() if re.search(r"\w", word)]


def test_few_words_hold_a_digit() -> None:
    words = prose_of(README)
    with_digit = [word for word in words if re.search(r"\d", word)]
    assert len(with_digit) <= 0.05 * len(words), with_digit
    assert 300 <= len(words) <= 550


def test_what_counts_as_prose() -> None:
    text = "# A 1\n\n```\npip 2\n```\n\n| 3 | 4 |\n\n![5](6.png) see [the *7*](8.md) - <!-- 9 -->\n"
    assert prose_of(text) == ["A", "1", "see", "the", "*7*"]


def test_no_figure_of_another_kernel() -> None:
    assert "earlier" not in README
    assert "smear" not in README


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", README)
    assert len(targets) > 15
    missing = [one for one in targets if not one.startswith("https:") and not (ROOT / one).exists()]
    assert missing == []


def test_its_table_of_models_is_the_registrys() -> None:
    assert page(README, short_table()) == README, "run benchmarks/families_table.py"


@pytest.fixture(scope="module")
def small() -> Any:
    """A pipeline whose call with a prompt alone takes a moment."""
    pipe = build_random_wan(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return WanPipeline.of(pipe, Settings(width=64, height=64, frames=5, steps=2, guidance=1.0))


@pytest.fixture
def names(small: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    # Patches that a page leaves in place are taken back behind it; torch.compile and torchao have tests of their own.
    monkeypatch.setattr("dit_accel.acceleration.api.compile_blocks", lambda _pipe: lambda: None)
    monkeypatch.setattr("dit_accel.acceleration.api.quantize_linears", lambda _pipe, kind: (lambda: None, kind))
    monkeypatch.setattr("dit_accel.pipelines.load", lambda _name: small)
    yield {"pipe": small, "prompt": "a ghost"}
    if any(module._forward_pre_hooks for module in small.transformer.modules()):
        dit_accel.unpatch(small)


@pytest.mark.parametrize("name", PAGES)
def test_the_code_of_a_page_runs(
    name: str,
    names: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = PYTHON.findall((ROOT / name).read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        exec(compile(block, name, "exec", dont_inherit=True), names)
    if "print(handle.summary())" in "".join(blocks):
        assert "attention:" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["README.md", "docs/choosing.md"])
def test_the_calls_of_a_table_run(file: str, names: dict[str, Any]) -> None:
    rows = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    calls = [code for row in rows for code in re.findall(r"`((?:dit_accel\.)?(?:patch|accelerate)\(.*?\))`", row)]
    assert len(calls) >= 3
    for code in calls:
        handle = eval(
            code, {"dit_accel": dit_accel, "patch": dit_accel.patch, "accelerate": dit_accel.accelerate} | names
        )
        handle.remove()
