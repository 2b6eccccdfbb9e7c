"""The pages speak of flags that the commands have, and of defaults that the built-in model has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from dit_accel.cli.main import app
from dit_accel.pipelines.embedded_model import SETTINGS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = get_command(app).commands
# A call of the command line, to the end of its line; `\` goes on.
CALL = re.compile(r"(?:dit-accel|dit_accel\.cli\.main) (?P<command>[a-z]+)(?P<rest>(?:\\\n|[^\n`#])*)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def flags_of(command: str) -> set[str]:
    parameters = COMMANDS[command].params
    return {flag for one in parameters for flag in (*one.opts, *one.secondary_opts)} | {"--help"}


def unknown_in(text: str) -> list[str]:
    """Commands and flags of a page that the command line does not have."""
    found = []
    for call in CALL.finditer(text):
        if call["command"] not in COMMANDS:
            found.append(call["command"])
        else:
            known = flags_of(call["command"])
            found += [f"{call['command']} {flag}" for flag in FLAG.findall(call["rest"]) if flag not in known]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_call_of_a_page_has_flags_that_there_are(page):
    assert unknown_in(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`dit-accel finetune embedded --start-anew`", ["finetune --start-anew"]),
        ("dit-accel generate embedded \\\n  --compare-dense --comparison\n--other", ["generate --comparison"]),
        ("python -m dit_accel.cli.main tone --out x", ["tone"]),
        ("dit-accel calibrate x --no-resume  # not --resume-not", []),
    ],
)
def test_a_flag_that_is_gone_is_seen(text, unknown):
    assert unknown_in(text) == unknown


@pytest.mark.parametrize("section", ["What is trained", "Objectives", "Data", "Two experts, many devices", "Resuming"])
def test_the_page_of_fine_tuning_names_flags_of_the_command(section):
    page = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    # Blocks of code call other programs too.
    named = set(FLAG.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    assert named - flags_of("finetune") == set()
    if section in ("Data", "Resuming"):
        assert "--start-over" in named


def test_the_page_of_the_embedded_model_has_its_defaults():
    s = SETTINGS
    text = (ROOT / "docs" / "embedded.md").read_text(encoding="utf-8")
    assert f"{s.frames} frames of {s.width} x {s.height}, {s.steps} steps and guidance {s.guidance:g}." in text
