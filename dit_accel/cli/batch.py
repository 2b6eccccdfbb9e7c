"""``dit-accel generate --prompts``: a file of prompts, one loaded model, a folder that can be gone on with."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text
from .processes import Processes

if TYPE_CHECKING:
    from .against_dense import SideRun

RESULTS = "results.json"
# Of a prompt in a file's name: at four bytes a character it still leaves room below the 255 of file systems.
LONGEST_SLUG = 48


@dataclass(frozen=True)
class Output:
    """One prompt of the file.

    Attributes:
        number: its place in the file, from 1.
        seed: of its noise: the seed of the first prompt plus its place.
        file: where its video or image is, or will be.
    """

    number: int
    prompt: str
    seed: int
    file: Path

    @property
    def is_finished(self) -> bool:
        """Files are written whole, so that one that is there is finished."""
        return self.file.exists()


def slug(prompt: str) -> str:
    """Letters and digits of a prompt, in any script, as part of a file's name; may be empty."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:LONGEST_SLUG].strip("-")


def plan_outputs(prompts: Sequence[str], folder: Path, seed: int, suffix: str) -> list[Output]:
    """Names by number and slug, such as ``002-a-red-car.mp4``."""
    digits = max(3, len(str(len(prompts))))
    outputs = []
    for place, prompt in enumerate(prompts):
        words = slug(prompt)
        name = f"{place + 1:0{digits}d}{'-' if words else ''}{words}{suffix}"
        outputs.append(Output(place + 1, prompt, seed + place, folder / name))
    return outputs


@dataclass(frozen=True)
class Batch:
    """Prompts of a file, and where their outputs go.

    Attributes:
        prompts: in the order of the file.
        folder: of the outputs, and of the settings that made them (``settings.json``).
        seed: of the first prompt.
        settings: plain data; outputs of other settings are never taken for one's own.
        processes: that share the prompts out.
    """

    prompts: Sequence[str]
    folder: Path
    seed: int
    settings: Mapping[str, Any]
    processes: Processes = field(default_factory=Processes)

    def claim(self, suffix: str) -> list[Output]:
        """Keep the settings in the folder, which is made if it is missing, and say which outputs are finished.

        Where processes share the prompts the first of them does so for all.

        Raises:
            ValueError: the folder cannot be written, or holds outputs of other settings.
        """
        outputs = self._claim(suffix) if self.processes.is_first else None
        return self.processes.from_first(outputs)

    def _claim(self, suffix: str) -> list[Output]:
        from ..parts import ANOTHER, Parts

        outputs = plan_outputs(self.prompts, self.folder, self.seed, suffix)
        finished = [output for output in outputs if output.is_finished]
        Parts(self.folder, ANOTHER).claim(self.settings, [output.file for output in finished])
        for output in finished:
            print(f"{output.file} is finished already; it is left as it is.", file=sys.stderr)
        return outputs

    def make(self, outputs: Sequence[Output], run: Callable[[Output], SideRun], quiet: bool) -> dict[str, Any]:
        """Make what is missing, in order, and save each before the next; each process its share of that.

        Args:
            run: makes one, freshly patched.
            quiet: print no lines.

        Returns:
            The settings, a row for each output of all processes (``made`` is None where it was finished before), and
            the summary of this process' last patch. Of many processes the first writes that to the folder too
            (``results.json``).
        """
        from ..pipelines.generate import save

        rows: list[dict[str, Any]] = []
        summary = None
        # As the first process found them: others may have finished some since.
        missing = self.processes.from_first([output for output in outputs if not output.is_finished])
        mine = self.processes.share(missing)
        finished = [output for output in outputs if output not in missing] if self.processes.is_first else []
        for output in sorted([*finished, *mine], key=lambda output: output.number):
            made = None
            if output in mine:
                side = run(output)
                save(side.made, output.file)
                summary = side.summary
                made = _facts(side)
            row: dict[str, Any] = {
                "number": output.number,
                "prompt": output.prompt,
                "seed": output.seed,
                "file": str(output.file),
                "made": made,
            }
            if self.processes.number > 1:
                row["process"] = None if made is None else self.processes.rank
            rows.append(row)
            if not quiet:
                spent = "finished" if made is None else f"{made['seconds']:.2f} s"
                print(f"{output.number:>4} of {len(outputs)} {spent:>12}   {output.file}", flush=True)
        rows = sorted(self.processes.all_of(rows), key=lambda row: row["number"])
        if not quiet and summary is not None and self.processes.is_first:
            print(f"the last of them:\n{summary}")
        report = {
            **self.settings,
            "folder": str(self.folder),
            "outputs": rows,
            "summary": None if summary is None else summary.to_dict(),
        }
        if self.processes.number > 1:
            report["processes"] = self.processes.number
            if self.processes.is_first:
                write_text(self.folder / RESULTS, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            self.processes.end()
        return report


def batch_folder(out: Path | None, model: str, seed: int) -> Path:
    """The folder to write in, always the same by default, so that a second run goes on.

    Raises:
        ValueError: a file, or the name of one.
    """
    from ..pipelines.generate import PICTURES, VIDEOS

    if out is None:
        return Path("outputs") / f"{model.strip('./').replace('/', '--')}-{seed}"
    if out.is_file() or (out.suffix.lower() in (*VIDEOS, *PICTURES) and not out.is_dir()):
        raise ValueError(f"With --prompts --out is a folder, got {out}.")
    return out


def _facts(side: SideRun) -> dict[str, Any]:
    frames, height, width, _ = side.made.frames.shape
    assert side.summary is not None
    return {
        "seconds": side.made.seconds,
        "width": width,
        "height": height,
        "frames": frames,
        "density": side.summary.density,
        "mean_density": side.summary.mean_density,
        "nan_values": side.made.nan_values,
    }
