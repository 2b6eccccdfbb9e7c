"""Every preset at real length as one table of docs/fidelity.md: fidelity of many clips, seconds of some of them.

    python -m benchmarks.presets_table                                         # show it
    python -m benchmarks.presets_table --write                                 # put it into the page
    python -m benchmarks.presets_table fidelity.json --seconds seconds.json    # of files of your own

Files are of ``benchmarks/verify_presets.py``, of one model, size and number of steps, and of the same recipes. Those of
fidelity may be of several processes on one GPU; further ones add prompts (``--first``). Those of seconds are of
processes that had a GPU each; further ones add rows, or measure some again: the last file counts. Their clips are some
of the others', and have their PSNR beside their seconds. A Frechet distance is of the first file's clips.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_accel.quality.bootstrap import bootstrap_mean, range_of
from dit_accel.quality.card import escaped, interval_text
from dit_accel.quality.metrics import METRICS
from dit_accel.quality.results import result_from_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "fidelity.md"
BEGIN, END = "<!-- presets: benchmarks/presets_table.py -->\n", "<!-- end of presets -->\n"
HEADS = ("recipe", "density", "steps computed", "seconds", "times as fast", "PSNR of these clips", "PSNR, dB", "SSIM",
         "LPIPS", "flicker", "FVD")  # fmt: skip
# Both files' clips must have these in common, or their decibels are of different runs.
SAME = ("model", "size", "frames", "steps", "guidance", "dtype")


def table(fidelity: Sequence[Mapping[str, Any]], seconds: Sequence[Mapping[str, Any]]) -> str:
    """What was run, the commands, and the rows, the nearest to dense first.

    Args:
        fidelity: files of other prompts each.
        seconds: files of some rows each; of a row in several the last counts.

    Raises:
        ValueError: files of different runs, a prompt twice, or seconds of processes that shared a GPU.
    """
    _refuse([*fidelity, *seconds])
    for one in seconds:
        if (shared := one["facts"]["processes_on_a_gpu"]) != 1:
            raise ValueError(f"seconds must be of processes with a GPU each, got {shared} on one.")
    facts, settings = seconds[0]["facts"], seconds[0]["facts"]["settings"]
    timed: dict[str, Mapping[str, Any]] = {row["row"]: row for one in seconds for row in one["rows"]}
    rows = sorted(_joined(fidelity), key=lambda row: -_psnr(row))
    steps = settings["steps"]
    dense = [row["dense_seconds"]["median"] for row in timed.values()]
    how = ["compiled" if settings["compile"] else "eager"]
    how += ["blocks of the accelerated side replayed as CUDA graphs"] if settings.get("graphs") else []
    all_clips, timed_clips = (_either(row["clips"] for row in found) for found in (rows, timed.values()))
    said = (
        f"{escaped(settings['model'])}, {facts['device']['name']}, torch {facts['versions']['torch']}, {steps} steps: "
        f"fidelity of {all_clips} clips, FVD of {fidelity[0]['facts']['prompts']} clips to the dense ones; "
        f"seconds of {timed_clips} of them, "
        f"{' and '.join(how)}; dense takes {min(dense):.2f} to {max(dense):.2f} s beside them. In brackets the range "
        "over clips, of times the noise of the runs."
    )
    lines = [_line(HEADS), "|" + "---|" * len(HEADS)]
    lines += [_line(_cells(row, timed.get(row["row"]), steps)) for row in rows]
    commands = [one["facts"]["command"].partition(" --out")[0] for one in (*fidelity, *seconds)]
    left = [f"`{name}` did not run: {escaped(why)}" for name, why in fidelity[0]["failed"].items()]
    return "\n".join([said, "", "```", *commands, "```", "", *lines, *(["", *left] if left else [])])


def _refuse(files: Sequence[Mapping[str, Any]]) -> None:
    """Files whose clips are not of the same runs and recipes, the first one's."""
    ours = files[0]["facts"]["settings"]
    recipes = {row["row"]: row["recipe"] for row in files[0]["rows"]}
    for one in files[1:]:
        for name in SAME:
            if ours[name] != one["facts"]["settings"][name]:
                theirs = one["facts"]["settings"][name]
                raise ValueError(f"all files must be of one {name}, got {ours[name]!r} and {theirs!r}.")
        for row in one["rows"]:
            if row["recipe"] != recipes.get(row["row"]):
                raise ValueError(f"row {row['row']!r} is another recipe than in the first file.")


def _joined(files: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the first file with the clips of all files that have them.

    Raises:
        ValueError: a prompt twice.
    """
    rows = [dict(row) for row in files[0]["rows"]]
    for row in rows if len(files) > 1 else ():
        same = [other for one in files for other in one["rows"] if other["row"] == row["row"]]
        clips = [result_from_json(clip) for other in same for clip in other["each"]]
        if len({(clip.prompt, clip.seed) for clip in clips}) < len(clips):
            raise ValueError(f"two files of fidelity have the same clip of row {row['row']!r}.")
        values = {
            name: [clip.metrics[name].value for clip in clips if clip.metrics[name].value is not None]
            for name in row["metrics"]
        }
        row["metrics"] = {name: bootstrap_mean(found).to_json() for name, found in values.items()}
        row["clips"] = len(clips)
        row["density"] = range_of([clip.density for clip in clips]).to_json()
        row["computed_share"] = range_of([clip.ran.computed_share for clip in clips]).to_json()
    return rows


def _either(counts: Iterable[int]) -> str:
    """``6 or 8``."""
    return " or ".join(map(str, sorted(set(counts))))


def _cells(row: Mapping[str, Any], timed: Mapping[str, Any] | None, steps: int) -> list[str]:
    """Under :data:`HEADS`."""
    density, share, fvd = row["density"], row["computed_share"], row["fvd"]
    return [
        f"`{row['row']}`",
        "-" if density is None else f"{density['mean']:.3f}",
        "-" if share is None else f"{steps * share['mean']:.0f} of {steps}",
        *(["-"] * 3 if timed is None else _times(timed)),
        *(_metric(row, name) for name in ("psnr", "ssim", "lpips", "flicker")),
        "-" if fvd is None else f"{fvd:.1f}",
    ]


def _times(timed: Mapping[str, Any]) -> list[str]:
    return [
        f"{timed['total_seconds']['median']:.2f}",
        interval_text(timed["speedup"], 2, "median"),
        f"{float(timed['metrics']['psnr']['mean']):.1f}" if "psnr" in timed["metrics"] else "-",
    ]


def _metric(row: Mapping[str, Any], name: str) -> str:
    found = row["metrics"].get(name)
    return "-" if found is None else interval_text(found, METRICS[name].digits, "mean")


def _psnr(row: Mapping[str, Any]) -> float:
    return float(row["metrics"]["psnr"]["mean"]) if "psnr" in row["metrics"] else float("-inf")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page(text: str) -> str:
    """``text`` with the table as it is now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    files = [_read(sorted(RESULTS.glob(f"long_presets_{name}*_h200.json"))) for name in ("fidelity", "seconds")]
    return f"{before}{BEGIN}\n{table(*files)}\n\n{END}{after}"


def _read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="file", help="of fidelity; default: ours")
    parser.add_argument("--seconds", nargs="*", type=Path, default=[], metavar="file")
    parser.add_argument("--write", action="store_true", help="put ours into docs/fidelity.md")
    asked = parser.parse_args()
    if bool(asked.files) != bool(asked.seconds) or (asked.files and asked.write):
        parser.error("give files of fidelity and of seconds to show their table; --write takes ours")
    if asked.files:
        print(table(_read(asked.files), _read(asked.seconds)))
        return
    text = page(PAGE.read_text(encoding="utf-8"))
    if asked.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text.split(BEGIN)[1].split(END)[0])


if __name__ == "__main__":
    main()
