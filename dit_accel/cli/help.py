"""How the pages of ``--help`` look: options in groups, and calls to copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand, TyperOption

# Names of parameters, by group.
_GROUPS: Mapping[str, str] = {
    "What is made": (
        "prompt prompts_file negative_prompt count size frames steps guidance seed seeds image last_image mask video"
    ),
    "Pipeline": "pipeline scheduler lora offload compiled graphs linear vae arch layers batch",
    "Recipe": (
        "recipe profiles changes imports calibration rederive adapter backend density max_error order rules "
        "transformer target buckets axis_prompts samples"
    ),
    "Measuring": (
        "compare_dense dense_backend dense_steps repeat repeats metrics verify kernels seconds layer at_step "
        "context_parallel ring"
    ),
    "Machine": "dtype device host port open_browser",
    "Output": "out pictures note start_over resume everything as_json debug help",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}
# Of a training: what it looks at, and how it goes.
_SAMPLES = frozenset(("data", "clips", "prompts_file", "count", "generate_steps", "size", "frames", "guidance"))


def group_of(command: str | None, option: str | None) -> str | None:
    """Where an option of a command stands; None for one that nobody has placed."""
    group = _GROUP_OF.get(option or "")
    if command != "finetune" or group in ("Recipe", "Machine", "Output"):
        return group
    return "Samples" if option in _SAMPLES else "Training"


# At most 76 characters each, so that a terminal of 80 columns breaks none.
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "generate": (
        'dit-accel generate --prompt "a ghost bouncing over the desert"',
        'dit-accel generate org/model --prompt "..." --set select.density=0.2',
        "dit-accel generate --prompts scenes.txt --out scenes --recipe fast",
    ),
    "compare": (
        'dit-accel compare --recipe auto --recipe "pooled;select.density=0.1"',
        "dit-accel compare org/model --count 4 --out outputs/judged",
    ),
    "verify": (
        "dit-accel verify org/model --prompts-file scenes.txt --compile",
        "dit-accel verify --profiles balanced,fast,max --count 4 --out outputs/card",
    ),
    "inspect": ('dit-accel inspect --prompt "two yellow stars bouncing in space"',),
    "calibrate": ("dit-accel calibrate org/model --recipe paro --out plans.safetensors",),
    "search": ("dit-accel search --density 0.3 --out found.json",),
    "tune": (
        "dit-accel tune org/model --target psnr=35",
        "dit-accel tune org/model --target speedup=2.5 --prompts-file scenes.txt",
    ),
    "finetune": ("dit-accel finetune --recipe sla --clips my_clips --max-seconds 450",),
    "bench": (
        "dit-accel bench --arch wan2.1-1.3b --size 832x480 --frames 81",
        "dit-accel bench --pipeline --arch wan2.1-1.3b --compile --recipe fast",
        "dit-accel bench --arch wan2.1-14b --layers 4 --context-parallel 2",
    ),
    "ui": ("dit-accel ui", "dit-accel ui org/model --port 8000"),
    "info": ("dit-accel info", "dit-accel info --all"),
}


class Command(TyperCommand):
    """A command whose options are in groups, with its examples behind them."""

    def __init__(self, name: str | None, **kwargs: Any) -> None:
        examples = EXAMPLES.get(name or "", ())
        super().__init__(name, **kwargs)
        # Blank lines between: the page joins what only a line end parts.
        self.epilog = "\n\n".join(("Examples:", *examples)) or None
        for option in self.params:
            if isinstance(option, TyperOption):
                option.rich_help_panel = group_of(name, option.name)
