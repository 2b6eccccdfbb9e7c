"""What the kernels compile to, as a digest of every variant's PTX, without a GPU: a change of names must keep them all.

    python -m benchmarks.ptx --json before.json            # digests of this tree
    python -m benchmarks.ptx --against before.json         # ... and what changed since
    python -m benchmarks.ptx --against HEAD~1              # the same, with both trees compiled
    PYTHONPATH=folder python -m benchmarks.ptx ...         # with another Triton, installed by pip --target folder

``ptx_calls.py`` calls every operation of the package as on a Hopper GPU (9.0), half precision and 8 bits, and as on an
Ampere GPU (8.0), everything. A digest leaves out comments, names of kernels, line numbers and what a debugger reads. It
holds what the compiler was told of the parameters, such as multiples of 16. The exit code is 1 where a digest differs,
or a launch is there in one version alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .against import tree_of

ROOT = Path(__file__).parent.parent
TARGETS = (90, 80)

# A launch's digest and its kernel's name, by the name of the call and its number.
Digests = dict[str, dict[str, str]]


def normalised(ptx: str) -> str:
    """PTX without what has no effect on the machine code."""
    ptx = re.sub(r"/\*.*?\*/", "", ptx, flags=re.DOTALL)
    lines, depth = [], 0
    for line in ptx.splitlines():
        line = " ".join(line.split("//")[0].split())
        if depth or re.match(r"\.section\s+\.debug", line):
            # A section of the debugger, up to its closing brace.
            depth += line.count("{") - line.count("}") + (not depth and "{" not in line)
            if line == "{":
                depth -= 1
            continue
        if not line or re.match(r"(\.loc|\.file)\b|\$L__(tmp|func_begin|func_end)\w*:$", line):
            continue
        lines.append(line.removesuffix(", debug") if line.startswith(".target") else line)
    text = "\n".join(lines)
    for name in re.findall(r"\.entry (\w+)", text):
        text = re.sub(rf"\b{re.escape(name)}(?=\b|_param_)", "kernel", text)
    return text


def digest(ptx: str, parameters: str = "") -> str:
    """16 hexadecimal digits of :func:`normalised` PTX, and of what the compiler was told of the parameters.

    A parameter on whose value the kernel is specialised may leave the PTX as it is, and costs a compilation.
    """
    return hashlib.sha256(f"{normalised(ptx)}\n{parameters}".encode()).hexdigest()[:16]


def digests(tree: Path, only: str, jobs: int, cache: str | None, keep: Path | None = None) -> dict[str, Any]:
    """Digests of a tree's package, and the Triton that compiled it; ``keep`` is a folder for the normalised PTX."""
    found: Digests = {}
    versions: set[str] = set()
    script = str(Path(__file__).with_name("ptx_calls.py"))
    with tempfile.TemporaryDirectory() as empty:
        path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
        # A cache of its own: its binaries are empty.
        env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": cache or empty}
        for target in TARGETS:
            options = [f"--target={target}", f"--only={only}"]
            running, files = [], [Path(empty, f"{target}-{n}") for n in range(jobs)]
            for n, file in enumerate(files):
                with file.open("w") as stdout:
                    command = [sys.executable, script, *options, f"--share={n}/{jobs}"]
                    running.append(subprocess.Popen(command, stdout=stdout, env=env))
            codes = [process.wait() for process in running]
            if any(codes):
                raise SystemExit("A call did not compile; its error is above.")
            for file in files:
                for line in file.read_text(encoding="utf-8").splitlines():
                    row = json.loads(line)
                    found[row["name"]] = {"kernel": row["kernel"], "digest": digest(row["ptx"], row["parameters"])}
                    versions.add(row["triton"])
                    if keep is not None:
                        keep.mkdir(parents=True, exist_ok=True)
                        name = re.sub(r"\W+", "_", row["name"])
                        text = f"{normalised(row['ptx'])}\n{row['parameters']}\n"
                        (keep / f"{name}.ptx").write_text(text, encoding="utf-8")
    return {"triton": ", ".join(sorted(versions)), "launches": dict(sorted(found.items()))}


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line for each launch whose digest differs, or that one side alone has."""
    if before["triton"] != after["triton"]:
        raise SystemExit(f"Digests of two Tritons, {before['triton']} and {after['triton']}, cannot be compared.")
    old, new = before["launches"], after["launches"]
    found = []
    for name in sorted({**old, **new}):
        if name not in new:
            found.append(f"gone       {name}  ({old[name]['kernel']})")
        elif name not in old:
            found.append(f"new        {name}  ({new[name]['kernel']})")
        elif old[name]["digest"] != new[name]["digest"]:
            found.append(f"different  {name}  ({new[name]['kernel']})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit, or a file that --json wrote")
    parser.add_argument("--json", type=Path, help="where the digests go")
    parser.add_argument("--only", default="", help="what a call's name must hold, such as 'attention'")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile at once")
    parser.add_argument("--cache", help="a folder that keeps compiled variants for the next run")
    parser.add_argument("--keep", type=Path, help="a folder for the normalised PTX, to look at differences")
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {asked.jobs}.")
    here = digests(ROOT, asked.only, asked.jobs, asked.cache, asked.keep)
    if not here["launches"]:
        parser.error(f"no call's name holds {asked.only!r}.")
    if asked.json:
        asked.json.write_text(json.dumps(here, indent=1) + "\n", encoding="utf-8")
    kernels = {row["kernel"] for row in here["launches"].values()}
    print(f"{len(here['launches'])} launches of {len(kernels)} kernels, Triton {here['triton']}")
    if asked.against is None:
        return
    if Path(asked.against).is_file():
        before = json.loads(Path(asked.against).read_text(encoding="utf-8"))
        before["launches"] = {name: row for name, row in before["launches"].items() if asked.only in name}
    else:
        with tree_of(asked.against) as tree:
            before = digests(tree, asked.only, asked.jobs, asked.cache)
    found = differences(before, here)
    print("\n".join(found) if found else f"The same PTX as in {asked.against}.")
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
