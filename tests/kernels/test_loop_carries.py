"""What loops of the kernels carry from step to step, as Triton's front end finds it: a trap of assignments.

It goes through a loop's body once, and what has another value then than before is carried. ``last`` in

    last = block
    for entry in range(count):
        use(last)
        last = block
        block = load(entry)

has the same value before and after, ``block``'s first one, and stays so in all steps. Python, and so the interpreter,
gives it the block before.
"""

import ast
from itertools import count
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "dit_accel" / "kernels"
TRAP = """
@triton.jit
def f(at, n):
    block = load(at)
    {before}
    for entry in range(n):
        if entry > 0:
            use(last)
        {inside}
        block = load(at + entry)
    use(last)
"""


class Values:
    """Numbers for values: names of one number are one value to the front end. Every ``if`` is taken."""

    def __init__(self) -> None:
        self.fresh = count()
        self.found: set[tuple[int, str, str]] = set()

    def value(self, node: ast.expr | None, known: dict[str, int]) -> int:
        if isinstance(node, ast.Name):
            return known.setdefault(node.id, next(self.fresh))
        return next(self.fresh)

    def assign(self, target: ast.expr, value: ast.expr | None, known: dict[str, int]) -> None:
        if isinstance(target, ast.Name):
            known[target.id] = self.value(value, known)
        elif isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            # All are read before the first is written.
            read = {f"value {n}": self.value(x, known) for n, x in enumerate(values)}
            for n, name in enumerate(target.elts):
                if isinstance(name, ast.Name):
                    known[name.id] = read[f"value {n}"]

    def block(self, body: list[ast.stmt], known: dict[str, int]) -> None:
        for node in body:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assign(target, node.value, known)
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                self.assign(node.target, None, known)
            elif isinstance(node, ast.If):
                other = dict(known)
                before = dict(known)
                self.block(node.body, known)
                self.block(node.orelse, other)
                for name, value in other.items():
                    if known.get(name) == before.get(name):
                        known[name] = value
            elif isinstance(node, ast.For | ast.While):
                self.loop(node, known)

    def loop(self, node: ast.For | ast.While, known: dict[str, int]) -> None:
        if isinstance(node, ast.For):
            self.assign(node.target, None, known)
            if "static_range" in ast.unparse(node.iter):
                for _ in range(2):
                    self.block(node.body, known)
                return
        after = dict(known)
        self.block(node.body, after)
        carried = [name for name in known if after[name] != known[name]]
        assigned = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
        for name in assigned & known.keys() - set(carried):
            for other in carried:
                if known[other] == known[name]:
                    self.found.add((node.lineno, name, other))
        # And as the front end goes on, with what is carried.
        for name in carried:
            known[name] = next(self.fresh)
        self.block(node.body, dict(known))


def traps(source: str) -> set[tuple[int, str, str]]:
    """Loops of jitted functions, with a variable that should be carried, and the one whose first value it keeps."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
            values = Values()
            values.block(node.body, {x.arg: next(values.fresh) for x in node.args.args})
            found |= values.found
    return found


@pytest.mark.parametrize(
    ("before", "inside", "found"),
    [
        ("last = block", "last = block", {(6, "last", "block")}),
        ("last, first = block, at", "last, first = block, entry", {(6, "last", "block")}),
        ("last = block", "if entry > 0: last = block", {(6, "last", "block")}),
        ("last = load(at)", "last = block", set()),
        ("last = block", "last = load(entry)", set()),
        ("last = block", "pass", set()),
    ],
)
def test_a_trap_is_seen(before, inside, found):
    assert traps(TRAP.format(before=before, inside=inside)) == found


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_no_loop_of_the_kernels_forgets_a_variable(path):
    assert traps(path.read_text(encoding="utf-8")) == set()
