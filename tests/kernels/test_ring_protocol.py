"""A model of how programs of the Hopper kernel share the ring of a permuted call: who waits for whom, and what is read.

In test_hopper_interpreted.py the kernel itself runs, in a few orders. Here every program has a warp that moves blocks
and one that loads tiles, both written as in ``hopper/permute.py`` and ``hopper/producer.py`` with a ``yield`` wherever
others may go on. A random scheduler runs them, some programs only after others have ended, as on a GPU that something
else keeps busy. Some tiles read nothing. ``ready`` and ``spent`` are the semaphores ``full_ptr`` and ``empty_ptr``.
"""

import ast
import hashlib
import io
import random
import tokenize
from pathlib import Path

import pytest

HOPPER = Path(__file__).parents[2] / "dit_accel" / "kernels" / "attention" / "hopper"
# What the model was written from. A function that has changed needs a look at the model, and then its new digest here.
MODELLED = {
    "permute.py": {
        "permute_kv": "1152456014fe",
        "kv_blocks_of_head": "b6b3589a0b26",
    },
    "producer.py": {
        "produce": "d4e30741123d",
        "count_loaded": "2f12a3fbec89",
        "report_loaded": "63180b7e21e7",
    },
    "tile_scheduler.py": {
        "advance_to_next_work": "f8756b0126ca",
        "tile_block": "5286e1f0ed78",
        "tile_header": "aa1e4574a76b",
    },
    "semaphores.py": {
        "semaphore_add": "f9bdd397d087",
        "semaphore_wait": "75df496a3f89",
        "semaphore_reached": "eaba777c2dc6",
    },
}


class Call:
    """What the programs of one call share; ``mutation`` names a line that is left out or changed."""

    def __init__(self, heads: int, tiles: int, pieces: int, ring: int, programs: int, mutation: str = "") -> None:
        self.heads, self.tiles, self.pieces, self.ring, self.programs = heads, tiles, pieces, ring, programs
        self.mutation = mutation
        self.taken = self.claimed = 0
        self.ready, self.spent = [0] * heads, [0] * heads
        self.in_ring: list[list[int | None]] = [[None] * pieces for _ in range(ring)]
        self.loaded: list[int] = []
        every = range(heads * tiles)
        self.empty = set(random.Random(heads * tiles + ring).sample(every, len(every) // 4))

    def claim_tile(self) -> int:
        self.taken += 1
        return self.taken - 1 + (self.programs if self.mutation == "first tiles are given" else 0)

    def move(self):
        while True:
            piece = self.claimed
            self.claimed += 1
            if piece >= self.heads * self.pieces:
                return
            head = piece // self.pieces
            yield
            while head >= self.ring and self.spent[head - self.ring] < self.tiles and self.mutation != "spent":
                yield
            self.in_ring[head % self.ring][piece % self.pieces] = head
            yield
            self.ready[head] += 1

    def load(self, program: int):
        last_head, loaded, known = -1, 0, False
        tile = program if self.mutation == "first tiles are given" else self.claim_tile()
        while tile < self.heads * self.tiles:
            head = tile // self.tiles
            if head - last_head >= self.ring and self.mutation != "early report":
                if loaded:
                    self.spent[last_head] += loaded
                last_head, loaded = head, 0
            while not known and self.ready[head] < self.pieces and self.mutation != "ready":
                yield
            following = self.claim_tile()
            if head != last_head:
                if loaded:
                    self.spent[last_head] += loaded
                last_head, loaded = head, 0
            loaded += 1
            next_head = min(following, self.heads * self.tiles - 1) // self.tiles
            known = tile not in self.empty and self.ready[next_head] >= self.pieces
            for piece in range(0 if tile in self.empty else self.pieces):
                assert self.in_ring[head % self.ring][piece] == head, "a block of another head was read"
                yield
            self.loaded.append(tile)
            tile = following
        if loaded:
            self.spent[last_head] += loaded


def run(call: Call, resident: int, seed: int) -> None:
    """Run a call with so many programs at a time; raises RuntimeError when all of them wait for ever."""
    chance = random.Random(seed)
    waiting = list(range(call.programs))
    running: dict[int, list] = {}
    idle = 0
    while waiting or running:
        while waiting and len(running) < resident:
            program = waiting.pop(0)
            running[program] = [call.move(), call.load(program)]
        program = chance.choice(list(running))
        warp = chance.choice(running[program])
        before = (call.taken, call.claimed, *call.ready, *call.spent, len(call.loaded), len(running), len(waiting))
        for _ in range(chance.randint(1, 12)):
            if next(warp, "ended") == "ended":
                running[program].remove(warp)
                break
        if not running[program]:
            del running[program]
        now = (call.taken, call.claimed, *call.ready, *call.spent, len(call.loaded), len(running), len(waiting))
        idle = idle + 1 if now == before else 0
        if idle > 4000:
            raise RuntimeError("deadlock")
    assert sorted(call.loaded) == list(range(call.heads * call.tiles))


def cases(count: int):
    chance = random.Random(0)
    for seed in range(count):
        programs = chance.randint(1, 6)
        sizes = {"heads": chance.randint(1, 9), "tiles": chance.randint(1, 5), "pieces": chance.randint(1, 4)}
        yield {**sizes, "ring": chance.randint(1, 4), "programs": programs}, chance.randint(1, programs), seed


def test_every_tile_reads_its_own_head_and_nobody_waits_for_ever():
    for sizes, resident, seed in cases(3000):
        run(Call(**sizes), resident, seed)


@pytest.mark.parametrize("mutation", ["first tiles are given", "early report", "spent", "ready"])
def test_without_a_rule_it_goes_wrong(mutation):
    """Else the model would show nothing."""
    wrong = 0
    for sizes, resident, seed in cases(200):
        try:
            run(Call(**sizes, mutation=mutation), resident, seed)
        except (RuntimeError, AssertionError):
            wrong += 1
    assert wrong > 0


def digest(source: str, name: str) -> str:
    """Of a function's tokens: comments, the docstring and line breaks do not count."""
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = function.body[0] if ast.get_docstring(function) else None
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
    tokens = [
        token.string or tokenize.tok_name[token.type]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if function.lineno <= token.start[0] <= function.end_lineno
        and not (first and first.lineno <= token.start[0] <= first.end_lineno)
        and token.type not in silent
    ]
    return hashlib.sha256(" ".join(tokens).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("file", "name"), [(file, name) for file, names in MODELLED.items() for name in names])
def test_the_kernel_is_the_one_that_was_modelled(file, name):
    found = digest((HOPPER / file).read_text(encoding="utf-8"), name)
    assert found == MODELLED[file][name], (
        f"hopper/{file}: {name} has changed. See that this file still models it, then write {found!r} in MODELLED."
    )


CODE = """
def f(x):
    '''Doc.'''
    if x:
        g()
    return x
"""
SAME = """
def f(
    x
):
    '''Another.

    Longer.
    '''
    # Why.
    if x:
        g()

    return x  # so
"""


def test_a_digest_sees_code_and_not_comments():
    assert digest(CODE, "f") == digest(SAME, "f")
    for line, other in (("    return", "        return"), ("return x", "return -x"), ("g()", "h()")):
        assert digest(CODE.replace(line, other), "f") != digest(CODE, "f")
