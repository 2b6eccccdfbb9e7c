"""Triton's GPU IR (TTGIR) as Python, so that kernels of warps with tasks of their own can run without a GPU.

A kernel in Gluon has no interpreter, and one of its Python would not see what the compiler makes of it: which variables
a loop carries, say. :func:`translate` turns the text of a compiled kernel into generators, one for each kind of warps;
what their operations do is in ``ttgir_machine.py``. Layouts are left out: a tensor is its numbers.

It knows the operations that the Hopper kernel has, and says so where it meets another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_LOCATION = re.compile(r'\s*loc\((?:unknown|#loc\d*|"[^"]*"(?:\(#loc\d*\))?)\)')
_NAME = r"%[\w$.-]+"
_OPERATION = re.compile(rf'(?:({_NAME}(?:, {_NAME})*)(?::(\d+))? = )?"?([a-z_]\w*(?:\.\w+)+)"?(.*)$')
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "i1": "bool",
    "i8": "int8",
    "f8E4M3FN": "float8_e4m3fn",
    "i32": "int32",
    "i64": "int64",
}
_INFIX = {
    **dict.fromkeys(("arith.addi", "arith.addf"), "+"),
    **dict.fromkeys(("arith.subi", "arith.subf"), "-"),
    **dict.fromkeys(("arith.muli", "arith.mulf"), "*"),
    "arith.divf": "/",
    "arith.andi": "&",
    "arith.ori": "|",
    "arith.xori": "^",
    "arith.shli": "<<",
    "arith.shrsi": ">>",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "slt": "<", "sle": "<=", "sgt": ">", "sge": ">=", "oeq": "==", "ogt": ">"}
_COMPARISONS |= {"olt": "<", "oge": ">=", "ole": "<=", "une": "!="}
_NOTHING = {
    "ttg.barrier",
    "gpu.barrier",
    "ttng.fence_async_shared",
    "ttg.async_commit_group",
    "tt.return",
    "ttg.warp_return",
}
_NOTHING |= {"ttg.warp_yield"}


def _variable(name: str) -> str:
    """A value's Python expression: ``%a#1`` is the second result of ``%a``."""
    name, _, number = name.partition("#")
    return "v_" + re.sub(r"\W", "_", name[1:].replace("-", "minus")) + (f"[{number}]" if number else "")


@dataclass(frozen=True)
class Operation:
    """One line: its result's variable or None, how many results, its name, and the rest."""

    result: str | None
    results: int
    name: str
    rest: str

    @property
    def operands(self) -> list[str]:
        plain = re.sub(r'"(?:[^"\\]|\\.)*"', "", self.rest)
        return [_variable(x) for x in re.findall(rf"{_NAME}(?:#\d+)?", plain)]

    @property
    def type(self) -> str:
        """Of the result, as far as it follows the last arrow, ``to`` or colon."""
        return re.split(r" -> | to | : ", self.rest)[-1].strip()

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of a result in registers or in shared memory; None of a number."""
        found = re.match(r"(?:tensor|!ttg\.memdesc)<((?:\d+x)+)", self.type)
        return tuple(int(n) for n in found[1][:-1].split("x")) if found else None

    @property
    def dtype(self) -> str:
        found = re.match(r"(?:(?:tensor|!ttg\.memdesc)<(?:\d+x)+)?(\w+)", self.type)
        assert found, self
        return f"torch.{_DTYPES[found[1]]}"

    def attribute(self, name: str) -> int:
        found = re.search(rf"\b{name} = (-?\d+)", self.rest)
        assert found, (name, self)
        return int(found[1])


def _constant(op: Operation) -> str:
    found = re.match(r" (?:dense<)?([^\s>]+)", op.rest)
    assert found, op
    text = found[1]
    if text.startswith("0x"):
        value = f"m.float_of_bits({text})"
    elif text in ("true", "false"):
        value = text.title()
    else:
        value = text
    return value if op.shape is None else f"torch.full({op.shape}, {value}, dtype={op.dtype})"


def _convert(op: Operation) -> str:
    (x,) = op.operands
    bits = " & 255" if op.name == "arith.extui" and "xi8" in op.rest else ""
    return f"({x}.to({op.dtype}){bits})" if op.shape else f"int({x})"


def _compare(op: Operation) -> str:
    kind = op.rest.split(",")[0].strip()
    assert kind in _COMPARISONS, op
    first, second = op.operands
    return f"({first} {_COMPARISONS[kind]} {second})"


def _call(function: str, *attributes: str) -> Callable[[Operation], str]:
    """A call of the machine with the operands, and then with attributes."""

    def text(op: Operation) -> str:
        return f"{function}({', '.join([*op.operands, *(str(op.attribute(x)) for x in attributes)])})"

    return text


def _shaped(function: str) -> Callable[[Operation], str]:
    return lambda op: f"{function}({op.operands[0]}, {op.shape})"


_EXPRESSIONS: dict[str, Callable[[Operation], str]] = {
    "arith.constant": _constant,
    "arith.cmpi": _compare,
    "arith.cmpf": _compare,
    "arith.select": _call("m.select"),
    "arith.divsi": _call("m.divide"),
    "arith.remsi": _call("m.remainder"),
    "arith.maxsi": _call("m.largest"),
    "arith.minsi": _call("m.smallest"),
    "arith.maxnumf": _call("torch.fmax"),
    **dict.fromkeys(("arith.extsi", "arith.extui", "arith.trunci", "arith.truncf", "arith.sitofp"), _convert),
    "arith.shrui": _call("m.shift_right"),
    "math.absf": _call("torch.abs"),
    "math.exp2": _call("torch.exp2"),
    "math.log2": _call("torch.log2"),
    "tt.get_program_id": lambda op: "w.program",
    "tt.get_num_programs": lambda op: "w.machine.programs",
    "tt.make_range": lambda op: f"torch.arange({op.attribute('start')}, {op.attribute('end')}, dtype=torch.int32)",
    "tt.splat": lambda op: f"m.splat({op.operands[0]}, {op.shape}, {'None' if 'tt.ptr' in op.type else op.dtype})",
    "tt.broadcast": lambda op: f"{op.operands[0]}.expand({op.shape})",
    "tt.reshape": lambda op: f"{op.operands[0]}.reshape({op.shape})",
    "tt.expand_dims": lambda op: f"{op.operands[0]}.unsqueeze({op.attribute('axis')})",
    "tt.trans": lambda op: f"{op.operands[0]}.permute({re.findall(r'i32: ([0-9, ]+)>', op.rest)[0]})",
    "tt.join": lambda op: f"torch.stack([{', '.join(op.operands)}], -1)",
    "tt.split": lambda op: f"{op.operands[0]}.unbind(-1)",
    "tt.bitcast": lambda op: f"{op.operands[0]}.contiguous().view({op.dtype})",
    "tt.addptr": lambda op: f"{op.operands[0]}.plus({op.operands[1]})",
    "tt.ptr_to_int": lambda op: op.operands[0],
    "tt.load": _call("m.load"),
    "tt.store": _call("m.store"),
    "tt.atomic_rmw": _call("m.atomic_add"),
    "ttg.convert_layout": lambda op: op.operands[0],
    "ttg.local_alloc": lambda op: (
        f"m.allocate({op.shape}, {op.dtype})" if op.rest.startswith(" :") else "unknown_allocation"
    ),
    "ttg.local_load": lambda op: f"{op.operands[0]}.clone()",
    "ttg.local_store": _call("m.local_store"),
    "ttg.memdesc_index": lambda op: f"{op.operands[0]}[{op.operands[1]}]",
    "ttg.memdesc_trans": lambda op: f"{op.operands[0]}.T",
    "ttng.init_barrier": lambda op: f"{op.operands[0]}.start({op.rest.split(',')[1].split(':')[0].strip()})",
    "ttng.barrier_expect": lambda op: f"{op.operands[0]}.expect({op.rest.split(',')[1].strip()}, {op.operands[1]})",
    "ttng.arrive_barrier": lambda op: (
        f"{op.operands[0]}.arrive({op.rest.split(',')[1].split(':')[0].strip()}, {', '.join(op.operands[1:])})"
    ),
    "ttng.wait_barrier": lambda op: f"yield from w.wait({', '.join(op.operands[:3])})",
    "ttng.async_tma_copy_global_to_local": lambda op: (
        f"w.tma_load({op.operands[0]}, ({', '.join(op.operands[1:-3])}), {', '.join(op.operands[-3:])})"
    ),
    "ttng.async_tma_copy_local_to_global": lambda op: (
        f"w.tma_store({op.operands[0]}, ({', '.join(op.operands[1:-1])}), {op.operands[-1]})"
    ),
    "ttng.async_tma_store_wait": lambda op: f"w.finish_copies({op.attribute('pendings')})",
    "ttg.async_copy_global_to_local": _call("w.copy"),
    "ttg.async_wait": lambda op: f"w.finish_copies({op.attribute('num')})",
    "ttng.warp_group_dot": lambda op: f"w.dot({', '.join(op.operands)}, {op.dtype}, {'isAsync = true' in op.rest})",
    "ttng.warp_group_dot_wait": lambda op: f"w.dot_wait([{', '.join(op.operands)}], {op.attribute('pendings')})",
    "ub.poison": lambda op: "None",
}
_COMBINERS = {"arith.maxsi": "m.amax", "arith.maxnumf": "m.amax", "arith.addf": "torch.sum"}


class _Translation:
    """The lines of a kernel and where in them the translation is; what it has written."""

    def __init__(self, ttgir: str) -> None:
        self.lines = [line for raw in ttgir.splitlines() if (line := _LOCATION.sub("", raw).strip())]
        self.at = next(n for n, line in enumerate(self.lines) if line.startswith("tt.func"))
        self.text: list[str] = []
        self.depth = 0

    def next(self) -> str:
        self.at += 1
        return self.lines[self.at - 1]

    def write(self, line: str) -> None:
        self.text.append("    " * self.depth + line)

    def function(self, name: str, header: str, warps: str) -> None:
        """A generator of a region; its parameters are those that the header names."""
        parameters = [_variable(x) for x in re.findall(rf"({_NAME}):", header)]
        self.write(f"def {name}({', '.join(['w', *parameters])}):")
        self.depth += 1
        self.write(f"w = w.of({warps})")
        self.region(None)
        self.write("yield")  # the last one, so that it is a generator
        self.depth -= 1

    def region(self, yields: str | None) -> str:
        """Operations up to the closing brace, whose line is returned; ``yields`` takes what they yield."""
        while True:
            line = self.next()
            if line.startswith("}"):
                return line
            found = _OPERATION.match(line)
            if not found:
                raise NotImplementedError(line)
            result, results, name, rest = found.groups()
            variable = result and ", ".join(_variable(x) for x in result.split(", "))
            op = Operation(variable, int(results or 1), name, rest)
            if name == "scf.yield":
                if op.operands:
                    self.write(f"{yields} = {', '.join(op.operands)}")
            else:
                self.operation(op)

    def operation(self, op: Operation) -> None:
        special = getattr(self, op.name.replace(".", "_"), None)
        if special is not None:
            special(op)
        elif op.name in _INFIX:
            first, second = op.operands
            self.write(f"{op.result} = {first} {_INFIX[op.name]} {second}")
        elif op.name in _EXPRESSIONS:
            self.write((f"{op.result} = " if op.result else "") + _EXPRESSIONS[op.name](op))
        elif op.name not in _NOTHING:
            raise NotImplementedError(f"{op.name}{op.rest[:200]}")

    def scf_if(self, op: Operation) -> None:
        self.write(f"if {op.operands[0]}:")
        closing = self.branch(op)
        if "else" in closing:
            self.write("else:")
            closing = self.branch(op)

    def branch(self, op: Operation) -> str:
        self.depth += 1
        self.write("pass")
        closing = self.region(op.result)
        self.depth -= 1
        return closing

    @staticmethod
    def carried(rest: str) -> tuple[str, str]:
        """What a loop carries, and what it starts with."""
        pairs = re.findall(rf"({_NAME}) = ({_NAME}(?:#\d+)?)", rest)
        return ", ".join(_variable(a) for a, _ in pairs), ", ".join(_variable(b) for _, b in pairs)

    def scf_for(self, op: Operation) -> None:
        found = re.match(
            rf" ({_NAME}) = ({_NAME}(?:#\d+)?) to ({_NAME}(?:#\d+)?) step ({_NAME})(?: iter_args\((.*?)\))?", op.rest
        )
        assert found, op
        index, *bounds = (_variable(x) for x in found.groups()[:4])
        names, starts = self.carried(found[5] or "")
        if names:
            self.write(f"{names} = {starts}")
        self.write(f"for {index} in range({', '.join(bounds)}):")
        self.depth += 1
        self.write("pass")
        self.region(names)
        self.depth -= 1
        if op.result:
            self.write(f"{op.result} = {names}")

    def scf_while(self, op: Operation) -> None:
        names, starts = self.carried(op.rest)
        if names:
            self.write(f"{names} = {starts}")
        self.write("while True:")
        self.depth += 1
        self.outer_result = op.result
        self.region(None)
        header = self.next()
        if header.startswith("^bb0"):
            inner = ", ".join(_variable(x) for x in re.findall(rf"({_NAME}):", header))
            self.write(f"{inner} = {op.result}")
        else:
            self.at -= 1
        self.region(names)
        self.depth -= 1

    def scf_condition(self, op: Operation) -> None:
        condition, *values = op.operands
        if values:
            self.write(f"{self.outer_result} = {', '.join(values)}")
        self.write(f"if not {condition}: break")

    def tt_reduce(self, op: Operation) -> None:
        self.next()
        combiner = _OPERATION.match(self.next())
        assert combiner, op
        assert self.next().startswith("tt.reduce.return"), op
        self.next()
        self.write(f"{op.result} = {_COMBINERS[combiner[3]]}({op.operands[0]}, {op.attribute('axis')})")

    def tt_elementwise_inline_asm(self, op: Operation) -> None:
        found = re.match(r' ("(?:[^"\\]|\\.)*")', op.rest)
        assert found, op
        text = re.sub(r"\\0A\s*", " ", found[1])
        self.write(f"{op.result} = yield from w.assembly({text}, {', '.join(op.operands)})")

    def ttg_memdesc_subslice(self, op: Operation) -> None:
        found = re.search(r"\[([\d, ]+)\]", op.rest)
        assert found, op
        assert op.shape, op
        begins = [int(n) for n in found[1].split(",")]
        parts = ", ".join(f"{a}:{a + n}" for a, n in zip(begins, op.shape, strict=True))
        self.write(f"{op.result} = {op.operands[0]}[{parts}]")

    def ttg_warp_specialize(self, op: Operation) -> None:
        """The partitions get what the operation names; the default one sees what is around it."""
        assert self.next().startswith("default")
        self.function("default", "", "w.warps")
        partitions = ["default(w)"]
        while (header := self.next()).startswith("partition"):
            name = header.split("(")[0]
            warps = re.search(r"num_warps\((\d+)\)", header)
            assert warps
            self.function(name, header.split(") num_warps")[0], warps[1])
            partitions.append(f"{name}(w, {', '.join(op.operands)})")
        self.write(f"yield from w.side_by_side([{', '.join(partitions)}])")


def translate(ttgir: str) -> tuple[str, list[str]]:
    """Python of a kernel's generator ``kernel(w, ...)``, and the names of its parameters in the IR."""
    translation = _Translation(ttgir)
    header = translation.next()
    translation.function("kernel", header.split(" attributes ")[0], "w.warps")
    return "\n".join(translation.text), re.findall(rf"({_NAME}):", header)
