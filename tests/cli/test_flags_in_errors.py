"""A command speaks of its own flags where the library speaks of Python's keywords."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

import dit_accel
from dit_accel.cli.errors import _KEYWORD, _in_flags
from dit_accel.cli.main import app


@pytest.mark.parametrize(
    ("sentence", "options", "said"),
    [
        ("Delete it or pass resume=False.", ("resume",), "Delete it or give --no-resume."),
        ("Or patch with rederive=True to select anew.", ("rederive",), "Or give --rederive to select anew."),
        ("Or patch with rederive=True to select anew.", ("resume",), "Or patch with rederive=True to select anew."),
        ("set lora_rank = 4, please", ("lora_rank",), "give --lora-rank 4, please"),
        ("pass teacher='current' here", ("teacher",), "give --teacher current here"),
        ("x=False, and backend='fa4' got", ("x", "backend"), "x=False, and backend='fa4' got"),
    ],
)
def test_what_is_said(sentence, options, said):
    assert _in_flags(sentence, options) == said


def test_every_keyword_that_advice_names_is_a_flag_of_some_command():
    commands = get_command(app).commands.values()
    flags = {option for command in commands for one in command.params for option in (*one.opts, *one.secondary_opts)}
    source = "".join(path.read_text(encoding="utf-8") for path in Path(dit_accel.__file__).parent.rglob("*.py"))
    advice = {(found["name"], found["value"]) for found in _KEYWORD.finditer(source)}
    assert {("resume", "False"), ("rederive", "True")} <= advice
    for name, value in advice:
        spelled = name.replace("_", "-")
        flag = f"--no-{spelled}" if value == "False" else f"--{spelled}"
        assert flag in flags, f"{name}={value} is advised, and no command has {flag}"
