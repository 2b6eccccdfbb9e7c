"""What ``generate --compare-dense`` says: two sides in turns, their times, and how near their clips are."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..patches.summary import PatchSummary
    from ..pipelines.generate import Generated
    from ..recipe import Recipe

# Of a terminal.
COLUMNS = 80


class SideRun(NamedTuple):
    """One run: its clip, and of the accelerated side what its own patch did."""

    made: Generated
    summary: PatchSummary | None = None
    recipe: Recipe | None = None


def compared(dense: Sequence[SideRun], fast: Sequence[SideRun], warm_up_steps: int) -> dict[str, Any]:
    """Median seconds of both sides, their ratio and its spread, PSNR of the first clips, and how it was measured."""
    from ..quality.measurement import number_to_json
    from ..quality.pixel import Psnr
    from ..quality.turns import Timing, speed_up
    from ..quality.video import ClipPair

    times = {side: Timing(tuple(run.made.seconds for run in runs)) for side, runs in (("dense", dense), ("fast", fast))}
    ratio = speed_up([times["dense"].seconds], [times["fast"].seconds])
    clips = ClipPair(dense[0].made.frames, fast[0].made.frames, dense[0].made.fps)  # type: ignore[arg-type]
    return {
        "seconds": times["fast"].median,
        "dense_seconds": times["dense"].median,
        "speedup": ratio.median,
        "speedup_range": [ratio.low, ratio.high] if ratio.count > 1 else None,
        "psnr_db": number_to_json(Psnr()(clips)),
        "turns": {
            "repeat": len(fast),
            "warm_up_steps_of_each_side": warm_up_steps,
            "patched_for_each_run": True,
            "dense": times["dense"].to_dict(),
            "accelerated": times["fast"].to_dict(),
        },
    }


def print_comparison(report: dict[str, Any]) -> None:
    """Both sides, the speed-up, and what was done to measure it."""
    turns, files = report["turns"], report["files"]
    for title, side, file in (("dense", "dense", files["dense"]), ("this recipe", "accelerated", files["out"])):
        print(f"{title:<11}  {turns[side]['median_s']:8.2f} s   {_ends(turns[side])}{file}")
    psnr = report["psnr_db"]
    spelled = "identical" if psnr == "inf" else f"PSNR {psnr:.2f} dB"
    ends = report["speedup_range"]
    spread = f"({ends[0]:.2f}x to {ends[1]:.2f}x)   " if ends else ""
    print(f"speed-up     {report['speedup']:8.2f} x   {spread}{spelled} between the two")
    count = turns["repeat"]
    runs = (
        "one run of each, which has no spread (--repeat 3 gives one)"
        if count == 1
        else f"{count} runs of each in turns (medians; in brackets the extremes, and the noise of the runs)"
    )
    what = f"{turns['warm_up_steps_of_each_side']} untimed steps of each side, then {runs}, each freshly patched"
    print(fill(f"measured: {what}", COLUMNS, subsequent_indent="    ", break_on_hyphens=False))
    if _all_dense(report["summary"]):
        text = "note: nothing was accelerated, every call of attention stayed dense: the two times differ by chance."
        print(fill(text, COLUMNS, subsequent_indent="    ", break_on_hyphens=False))


def _all_dense(summary: dict[str, Any]) -> bool:
    """Whether the accelerated side did what the dense one does."""
    return not any(summary[name] for name in ("sparse_calls", "cached_calls", "skipped_forwards", "changes"))


def _ends(timing: dict[str, Any]) -> str:
    return f"({timing['min_s']:.2f} to {timing['max_s']:.2f})   " if len(timing["seconds"]) > 1 else ""
