"""``dit-accel``: one command a file. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .console import speak_utf8
from .finetune import finetune
from .generate import generate
from .help import Command
from .info import info
from .inspect import inspect
from .search import search
from .tune import tune
from .ui import ui
from .verify import verify
from .waiting import wait_passively

app = typer.Typer(
    name="dit-accel",
    help="Faster diffusion transformers for video and images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"dit-accel {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which version this is.")
    ] = False,
) -> None:
    speak_utf8()
    wait_passively()


for command in (generate, compare, verify, inspect, calibrate, search, tune, finetune, bench, ui, info):
    app.command(cls=Command)(command)

if __name__ == "__main__":
    app()
