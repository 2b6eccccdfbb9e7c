"""The Hopper kernel, of 128 and of 64 queries a block and of 8 bits, run without a GPU against the fp64 oracle.

``interpret_hopper.py`` compiles it and runs the compiler's IR, so that what Triton's front end makes of the source
counts too. Layouts of registers and of shared memory are not seen here, and neither are the machine's fences.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from .interpret_hopper import CASES

ROOT = Path(__file__).parents[2]


def interpret(*arguments: str) -> list[dict]:
    """What is wrong, of each case."""
    command = [sys.executable, "-m", "tests.kernels.interpret_hopper", *arguments]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@cache
def wrong(with_means: bool) -> dict[str, str | None]:
    """Of all cases of a kind at once: a process of its own for each would compile and start for as long as it runs."""
    cases = [case for case in CASES if ("means" in case) is with_means]
    return {row["name"]: row["wrong"] for row in interpret(*cases)}


@pytest.mark.parametrize("case", CASES)
def test_matches_oracle(case):
    assert wrong("means" in case)[case] is None


@pytest.mark.parametrize(
    ("fault", "case", "said"),
    [
        ("first values", "pairs", "out: error"),
        ("neighbour's block", "pairs apart", ""),
        ("threads at a barrier", "pairs", "named barrier"),
        ("given back early", "half", "out: error"),
        ("loaded early", "pairs", ""),
        ("a block's product is lost", "half", "out: error"),
        ("another block's scale", "int8", "out: error"),
        ("order of weights", "int8_fp8", "out: error"),
        ("another block's scale, pairs", "pairs int8", "out: error"),
        ("another head's scales", "pairs int8 rows", "out: error"),
        ("a product of the wrong factor", "pairs int8_fp8", "out: error"),
        ("rows behind a last pair", "pairs int8 apart", "out of bounds"),
        ("sums of an older maximum", "pairs steep", "out: error"),
        ("keys not waited for", "half wide", "out: error"),
        ("a second block that is not there", "half wide", "error"),
        ("a partial block beside a full one", "half wide", "error"),
        ("a step too few", "half wide", "all warps wait"),
        ("the other block", "half wide", "out: error"),
        ("means of what is read", "half means", "error"),
        ("the other block's means", "means", "error"),
        ("the next word of bits", "means, many", "a place out of bounds"),
        ("a last mean of as many tokens", "means of 8", "error"),
        ("means behind the last", "half means", "error"),
        ("values of means end a step early", "means", "out: error"),
        ("means of another head", "half means of 8, whole steps", "error"),
        ("lists begin at the means", "half means", ""),
        ("means scaled twice", "half means, many", "error"),
    ],
)
def test_a_fault_in_the_kernel_shows(fault, case, said):
    (row,) = interpret(case, "--fault", fault, "--orders", "6")
    assert row["wrong"] is not None
    assert said in row["wrong"]
