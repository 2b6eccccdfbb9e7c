"""The pages of --help: every option in a group, defaults shown, and examples that can be copied and run."""

from __future__ import annotations

import shlex

import pytest
from typer.core import TyperOption
from typer.main import get_command
from typer.testing import CliRunner

from dit_accel.cli.help import EXAMPLES
from dit_accel.cli.main import app

COMMANDS = get_command(app).commands
NARROW = {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}


def _page(name: str) -> str:
    return CliRunner().invoke(app, [name, "--help"], env=NARROW).stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_a_group(name: str) -> None:
    options = [one for one in COMMANDS[name].params if isinstance(one, TyperOption)]
    assert [one.name for one in options if one.rich_help_panel is None] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_lines_that_can_be_copied(name: str) -> None:
    assert EXAMPLES[name]
    lines = [line.strip() for line in _page(name).splitlines()]
    for example in EXAMPLES[name]:
        assert len(example) <= 76
        assert example in lines


@pytest.mark.parametrize(("name", "example"), [(name, one) for name, all_of in EXAMPLES.items() for one in all_of])
def test_the_examples_are_understood(name: str, example: str) -> None:
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("dit-accel", name)
    parsed = COMMANDS[name].make_context(name, arguments)  # refuses options and values that there are not
    assert parsed.params


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_shown(name: str) -> None:
    page = " ".join(_page(name).replace("│", " ").split())
    for one in COMMANDS[name].params:
        if isinstance(one, TyperOption) and one.default not in (None, False, True) and not callable(one.default):
            assert f"[default: {one.default}]" in page, one.name


def test_what_has_no_default_says_what_is_taken() -> None:
    """Of options that a number or a name is given to; files and texts that are asked for are there or not."""
    page = " ".join(_page("compare").replace("│", " ").split())
    for words in ("Pixels. Default: the model's.", "Denoising steps. Default: the model's.", "Default: 16 prompts."):
        assert words in page
