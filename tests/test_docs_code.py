"""All other code of the pages: what is Python runs, what is a command is understood.

The pages that begin have their code run in `test_readme`, that of extending in `test_docs_site`. Here long work is
made short (fewer steps, a smaller size). What needs a hub, several GPUs or another package has a stand-in that takes
what the real thing takes.
"""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import diffusers
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from typer.main import get_command

import dit_accel
import dit_accel.kernels
import dit_accel.pipelines
from dit_accel import presets
from dit_accel.calibration import patterns, search
from dit_accel.cli.main import app
from dit_accel.pipelines.call_defaults import WanPipeline
from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.pipelines.settings import Settings
from tests.test_readme import PAGES as RUN_IN_TEST_README
from tests.test_readme import PYTHON

ROOT = Path(__file__).parent.parent
ALL = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted(ROOT.glob("integrations/*/README.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
    ROOT / "models" / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "DESIGN.md",
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in ALL}
ELSEWHERE = {*RUN_IN_TEST_README, "docs/extending.md"}
HERE = [name for name, text in TEXTS.items() if PYTHON.search(text) and name not in ELSEWHERE]
# Of all prompts one, at blocks that fit its 128 tokens.
SMALL = {"select.block": (32, 32)}


def shortened() -> dict[str, Callable[..., Any]]:
    """The long calls, on the real functions."""
    real = SimpleNamespace(
        calibrate=dit_accel.calibrate, tune=dit_accel.tune, search=search.search, rules=patterns.search_rules
    )

    def calibrate(pipe: Any, prompts: Any, recipe: str, *, out: str, generate_kwargs: dict[str, int]) -> Any:
        assert set(generate_kwargs) == {"height", "width"}
        return real.calibrate(pipe, prompts, recipe, out=out)

    def tune(pipe: Any, prompts: Any, target: str, *, out: str, generate_kwargs: dict[str, int]) -> Any:
        assert set(generate_kwargs) == {"num_inference_steps"}
        return real.tune(pipe, prompts, "psnr=1", out=out, verify=1, generate_kwargs={"num_inference_steps": 4})

    def heads(pipe: Any, prompts: Any, recipe: str, *, mean_density: float, orders: tuple[str, ...]) -> Any:
        base = presets.resolve(recipe).with_fields(SMALL)
        return real.search(pipe, prompts, base, mean_density=0.9, orders=orders, samples=1)

    def rules(pipe: Any, prompts: Any, recipe: Any = "patterns", *, mean_density: float) -> Any:
        more = {"num_inference_steps": 6}  # of which some are sparse where it carries
        return real.rules(pipe, prompts, recipe, mean_density=0.9, samples=1, generate_kwargs=more)

    return {"calibrate": calibrate, "tune": tune, "search": heads, "search_rules": rules}


def of_a_hub() -> Any:
    """A pipeline of a hub, which takes the calls that the real one takes."""
    pipe = create_autospec(diffusers.WanPipeline, instance=True)
    pipe.to.return_value = pipe
    pipe.transformer = create_autospec(diffusers.WanTransformer3DModel, instance=True)
    return pipe


@pytest.fixture(scope="module")
def small() -> Any:
    pipe = build_random_wan(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return WanPipeline.of(pipe, Settings(width=128, height=128, frames=5, steps=3, guidance=1.0))


@pytest.fixture
def names(small: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    short = shortened()
    for name in ("calibrate", "tune"):
        monkeypatch.setattr(dit_accel, name, short[name])
    monkeypatch.setattr(search, "search", short["search"])
    monkeypatch.setattr(patterns, "search_rules", short["search_rules"])
    monkeypatch.setattr(dit_accel, "load_adapter", create_autospec(dit_accel.load_adapter))
    monkeypatch.setattr(dit_accel, "register_family", create_autospec(dit_accel.register_family))
    monkeypatch.setattr(dit_accel.pipelines, "load", lambda name, device=None: MagicMock() if device else small)
    hub, found_there = MagicMock(), of_a_hub()
    hub.from_pretrained.return_value = found_there
    monkeypatch.setattr(diffusers, "WanPipeline", hub)
    for name, found in {"init_process_group": None, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, create_autospec(getattr(dist, name), return_value=found))
    monkeypatch.setattr(fsdp, "fully_shard", create_autospec(fsdp.fully_shard))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    monkeypatch.setitem(sys.modules, "cache_dit", MagicMock())
    monkeypatch.setitem(sys.modules, "kernels", MagicMock(get_local_kernel=lambda _path: dit_accel.kernels))
    return {
        "pipe": small,
        "model": small.transformer,
        "prompt": "a ghost",
        "prompts": ["a ghost"],
        "dit_accel": dit_accel,
        "patch": dit_accel.patch,
        "presets": presets,
        "torch": torch,
        "WanPipeline": hub,
    }


def patched(pipe: Any) -> bool:
    return any(module._forward_pre_hooks for module in pipe.transformer.modules())


def blocks() -> Iterator[Any]:
    for name in HERE:
        for number, code in enumerate(PYTHON.findall(TEXTS[name])):
            yield pytest.param(name, code, id=f"{name}-{number}")


def test_no_page_is_left_out() -> None:
    found = {name for name, text in TEXTS.items() if "```python" in text}
    assert found == ELSEWHERE | set(HERE)


@pytest.mark.parametrize(("name", "code"), blocks())
def test_the_code_of_a_page_runs(
    name: str, code: str, names: dict[str, Any], small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "enable_parallelism" in code:  # what it does to a patch is tested with processes of its own
        monkeypatch.setattr(dit_accel, "patch", create_autospec(dit_accel.patch))
    try:
        exec(compile(code, name, "exec", dont_inherit=True), names)
    finally:
        if patched(small):
            dit_accel.unpatch(small)
    recipe = names.get("recipe")
    assert recipe is None or isinstance(recipe, dit_accel.Recipe)


COMMANDS = get_command(app).commands
SHELL = re.compile(r"^```(?:bash)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What stands before a program of ours.
LAUNCHED = re.compile(r"^(?:torchrun|accelerate launch|python|\S*/python)\b")


def commands(text: str) -> list[list[str]]:
    """The words of each line of each block of a page, without comments; `\\` goes on."""
    lines = [line for block in SHELL.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []  # a sentence with an apostrophe, in a file of prompts


def understood(words: list[str]) -> bool:
    """Whether a line is a call of our command line, which then takes it."""
    if "dit_accel.cli.main" in words:
        words = words[words.index("dit_accel.cli.main") :]
    elif words[0] != "dit-accel":
        return False
    if words[-1] == "..." and not words[-2].startswith("--"):
        words = words[:-1]
    command = COMMANDS[words[1]]
    assert command.make_context(words[1], words[2:]).params is not None
    return True


@pytest.mark.parametrize("name", TEXTS)
def test_the_command_line_takes_the_calls_of_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    called = [words for words in commands(TEXTS[name]) if understood(words)]
    assert len(called) == len(
        re.findall(r"^(?:dit-accel|accelerate launch.*?) ", "\n".join(SHELL.findall(TEXTS[name])), re.M)
    )


def scripts(name: str) -> Iterator[tuple[Path, list[str]]]:
    """Programs of this repository that a page calls, with their flags."""
    folder = (ROOT / name).parent
    for words in commands(TEXTS[name]):
        if not LAUNCHED.match(" ".join(words)):
            continue
        for place, word in enumerate(words[1:], 1):
            if word == "-m" and words[place + 1].startswith("benchmarks."):
                path = ROOT / (words[place + 1].replace(".", "/") + ".py")
            elif word.endswith(".py"):
                path = next((one for one in (ROOT / word, folder / word) if one.exists()), ROOT / word)
            else:
                continue
            yield path, [one.partition("=")[0] for one in words[place + 1 :] if re.match(r"--[a-z]", one)]
            break


@functools.cache
def source(path: Path) -> str:
    """Of a program, and of the modules beside it that may read its options."""
    return "".join(one.read_text(encoding="utf-8") for one in path.parent.glob("*.py"))


@pytest.mark.parametrize("name", [name for name in TEXTS if list(scripts(name))])
def test_programs_that_a_page_calls_have_its_flags(name: str) -> None:
    for path, flags in scripts(name):
        assert path.exists(), path
        missing = [flag for flag in flags if f'"{flag}"' not in source(path)]
        assert missing == [], path


def test_a_wrong_call_is_seen() -> None:
    page = "```\ndit-accel generate --prompt 'a b' \\\n  --steps none\n```\n"
    (words,) = commands(page)
    assert words[-2:] == ["--steps", "none"]
    with pytest.raises(Exception, match="integer"):
        understood(words)
    assert not understood(["docker", "run"])
