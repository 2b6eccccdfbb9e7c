"""What operations of Triton's GPU IR do on a GPU, for kernels that ``ttgir.py`` has turned into Python.

Warps go on in any order, and whatever is asynchronous takes any time: copies arrive, and products read shared memory,
as late as the next wait allows. Barriers are the hardware's: one in shared memory knows the parity of its phase, a
named one counts threads. Shared memory starts with NaN.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch

Steps = Generator[Callable[[], bool] | None, None, Any]


class Stuck(AssertionError):
    """A launch that cannot go on: all warps wait, a barrier is given what it does not expect, a place is no place."""


def _always() -> bool:
    return True


@dataclass
class Barrier:
    """In shared memory: a phase is over when all have arrived and all bytes have."""

    arrivals: int = 0
    missing: int = 0
    bytes: int = 0
    done: int = 0

    def start(self, arrivals: int) -> None:
        self.arrivals = self.missing = arrivals

    def arrive(self, number: int, predicate: bool = True) -> None:
        if predicate:
            self.missing -= number
            self._turn()

    def expect(self, count: int, predicate: bool) -> None:
        if predicate:
            self.bytes += count
            self.arrive(1)

    def loaded(self, count: int) -> None:
        self.bytes -= count
        self._turn()

    def _turn(self) -> None:
        if self.missing < 0:
            raise Stuck("more arrivals at a barrier than it expects")
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.done = self.arrivals, self.done + 1


@dataclass
class Named:
    """A named barrier."""

    threads: int = 0
    expected: int = 0
    done: int = 0

    def arrive(self, threads: int, expected: int) -> None:
        if self.threads and self.expected != expected:
            raise Stuck(f"a named barrier of {self.expected} and of {expected} threads")
        self.expected, self.threads = expected, self.threads + threads
        if self.threads > expected:
            raise Stuck(f"{self.threads} threads at a named barrier of {expected}")
        if self.threads == expected:
            self.threads, self.done = 0, self.done + 1


@dataclass(frozen=True, eq=False)
class Pointer:
    """Places in global memory: a tensor's storage, and which of its elements."""

    memory: torch.Tensor
    at: Any

    @classmethod
    def to(cls, x: torch.Tensor) -> Pointer:
        length = x.untyped_storage().nbytes() // x.element_size()
        return cls(x.as_strided((length,), (1,), 0), x.storage_offset())

    def plus(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.at + (offset.long() if isinstance(offset, torch.Tensor) else offset))

    def expand(self, shape: tuple[int, ...]) -> Pointer:
        return Pointer(self.memory, self.at.expand(shape))

    def reshape(self, shape: tuple[int, ...]) -> Pointer:
        return Pointer(self.memory, self.at.reshape(shape))

    def unsqueeze(self, axis: int) -> Pointer:
        return Pointer(self.memory, self.at.unsqueeze(axis))


class Functions:
    """Operations that need not know whose they are."""

    @staticmethod
    def float_of_bits(bits: int) -> float:
        return float(struct.unpack("f", struct.pack("I", bits))[0])

    @staticmethod
    def select(condition: Any, yes: Any, no: Any) -> Any:
        if not isinstance(condition, torch.Tensor):
            return yes if condition else no
        return torch.where(condition, yes, no)

    @staticmethod
    def divide(a: Any, b: Any) -> Any:
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return torch.div(a, b, rounding_mode="trunc")
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)

    @classmethod
    def remainder(cls, a: Any, b: Any) -> Any:
        return a - cls.divide(a, b) * b

    @staticmethod
    def shift_right(a: torch.Tensor, b: Any) -> torch.Tensor:
        """Of a 32-bit word, with zeros from above."""
        return ((a.long() & 0xFFFFFFFF) >> b).to(torch.int32)

    @staticmethod
    def largest(a: Any, b: Any) -> Any:
        return torch.maximum(a, b) if isinstance(a, torch.Tensor) else max(a, b)

    @staticmethod
    def smallest(a: Any, b: Any) -> Any:
        return torch.minimum(a, b) if isinstance(a, torch.Tensor) else min(a, b)

    @staticmethod
    def amax(x: torch.Tensor, axis: int) -> Any:
        """Largest along an axis, of numbers: NaN is none. Of a vector it is a Python number."""
        if x.is_floating_point():
            x = torch.where(x.isnan(), -torch.inf, x)
        largest = x.amax(axis)
        return largest if largest.ndim else largest.item()

    @staticmethod
    def splat(value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> Any:
        if isinstance(value, Pointer):
            return Pointer(value.memory, torch.full(shape, value.at, dtype=torch.int64))
        return torch.full(shape, value, dtype=dtype)

    @staticmethod
    def load(where: Pointer, mask: Any = True, other: Any = None) -> Any:
        if isinstance(where.at, int):
            if mask:
                _check(where.memory, torch.tensor([where.at]))
            return where.memory[where.at].item() if mask else other
        chosen = torch.as_tensor(mask).expand(where.at.shape)
        read = torch.zeros(where.at.shape, dtype=where.memory.dtype) if other is None else other.clone()
        at = where.at[chosen]
        _check(where.memory, at)
        read = read.to(where.memory.dtype)
        read[chosen] = where.memory[at]
        return read

    @staticmethod
    def store(where: Pointer, value: Any, mask: Any = True) -> None:
        chosen = torch.as_tensor(mask).expand(where.at.shape)
        at = where.at[chosen]
        _check(where.memory, at)
        where.memory[at] = value[chosen]

    @staticmethod
    def atomic_add(where: Pointer, value: int, mask: bool) -> int:
        before = int(where.memory[where.at])
        if mask:
            where.memory[where.at] += value
        return before

    @staticmethod
    def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        """Shared memory; 64-bit integers are barriers."""
        if dtype == torch.int64:
            return [Barrier() for _ in range(shape[0])]
        return torch.full(shape, torch.nan if dtype.is_floating_point else 77).to(dtype)

    @staticmethod
    def local_store(value: torch.Tensor, memory: torch.Tensor) -> None:
        memory.copy_(value)


def _check(memory: torch.Tensor, at: torch.Tensor) -> None:
    if at.numel() and not 0 <= int(at.min()) <= int(at.max()) < len(memory):
        raise Stuck("a place out of bounds")


@dataclass
class Machine:
    """``programs`` of one launch, side by side, and what is under way."""

    programs: int
    random: random.Random
    copies: list[Callable[[], None]] = field(default_factory=list)

    def later(self, copy: Callable[[], None]) -> None:
        self.copies.append(copy)

    def run(self, kernels: list[Steps]) -> None:
        """All programs to their end. Every turn is one of those that can go on, or a copy."""
        waiting: dict[int, Callable[[], bool]] = dict.fromkeys(range(len(kernels)), _always)
        tasks = dict(enumerate(kernels))
        number = len(tasks)
        children: dict[int, int] = {}
        parents: dict[int, int] = {}
        slow: set[int] = set()
        while tasks:
            if self.random.random() < 1 / 16:
                # Some do not go on for a while, so that the others get as far ahead of them as they can.
                slow = {n for n in tasks if self.random.random() < 0.5}
            able = [n for n, ready in waiting.items() if ready()]
            able = [n for n in able if n not in slow] or ([] if self.copies else able)
            pick = self.random.randrange(len(able) + len(self.copies)) if able or self.copies else -1
            if pick < 0:
                raise Stuck("all warps wait")
            if pick >= len(able):
                self.copies.pop(pick - len(able))()
                continue
            n = able[pick]
            try:
                asked = next(tasks[n])
            except StopIteration:
                del tasks[n], waiting[n]
                if n in parents:
                    children[parents[n]] -= 1
                continue
            if isinstance(asked, list):
                children[n] = len(asked)
                waiting[n] = lambda n=n: children[n] == 0
                for task in asked:
                    tasks[number], waiting[number], parents[number] = task, _always, n
                    number += 1
            else:
                waiting[n] = asked or _always


class Product:
    """A product under way: what it reads of shared memory may be read now, or when it is waited for."""

    def __init__(self, compute: Callable[[], torch.Tensor], now: bool) -> None:
        self.compute = compute
        self.value = compute() if now else None

    def finish(self) -> None:
        if self.value is None:
            self.value = self.compute()


class Warps:
    """The warps of one region, in step; ``named`` are the barriers of their program."""

    def __init__(self, machine: Machine, program: int, warps: int, named: list[Named] | None = None) -> None:
        self.machine, self.program, self.warps = machine, program, warps
        self.named = named or [Named() for _ in range(16)]
        self.products: list[Product] = []
        self.own_copies: list[Callable[[], None]] = []

    def of(self, warps: int) -> Warps:
        return Warps(self.machine, self.program, warps, self.named)

    def side_by_side(self, regions: list[Steps]) -> Steps:
        yield regions  # type: ignore[misc]

    def wait(self, barrier: Barrier, parity: int, predicate: bool = True) -> Steps:
        yield (lambda: barrier.done % 2 != parity) if predicate else None

    def _copy_once(self, copy: Callable[[], None]) -> Callable[[], None]:
        todo = [copy]

        def once() -> None:
            if todo:
                todo.pop()()

        self.machine.later(once)
        return once

    def tma_load(
        self, tiles: Any, at: tuple[int, ...], memory: torch.Tensor, barrier: Barrier, predicate: bool
    ) -> None:
        """Rows and columns past the matrix's end read as zero."""
        assert predicate
        assert min(at) >= 0

        def copy() -> None:
            memory.view(torch.uint8).zero_()
            part = _tile(tiles, at, memory.shape)
            memory[: part.shape[0], : part.shape[1]] = part
            barrier.loaded(memory.numel() * memory.element_size())

        self.machine.later(copy)

    def tma_store(self, tiles: Any, at: tuple[int, ...], memory: torch.Tensor) -> None:
        def copy() -> None:
            part = _tile(tiles, at, memory.shape)
            part.copy_(memory[: part.shape[0], : part.shape[1]])

        self.own_copies.append(self._copy_once(copy))

    def copy(self, where: Pointer, memory: torch.Tensor) -> None:
        self.own_copies.append(self._copy_once(lambda: memory.copy_(Functions.load(where))))

    def finish_copies(self, left: int) -> None:
        assert left == 0
        for copy in self.own_copies:
            copy()
        self.own_copies.clear()

    def dot(self, a: Any, b: Any, acc: Any, use_acc: bool, dtype: torch.dtype, later: bool) -> Any:
        def compute() -> torch.Tensor:
            product = a.float() @ b.float()
            return (acc + product if use_acc else product).to(dtype)

        product = Product(compute, self.machine.random.random() < 0.5)
        if not later:
            product.finish()
            return product.value
        self.products.append(product)
        return product

    def dot_wait(self, values: list[Any], left: int) -> Any:
        finished = self.products[: len(self.products) - left]
        for product in finished:
            product.finish()
        self.products = self.products[len(finished) :]
        found = [x.value if isinstance(x, Product) else x for x in values]
        assert all(x is not None for x in found), "a product is read that was not waited for"
        return found[0] if len(found) == 1 else tuple(found)

    def assembly(self, text: str, *args: Any) -> Steps:
        """What the kernel's own instructions do (softmax.py, named_barriers.py, semaphores.py, permute.py)."""
        if "bar.arrive" in text:
            self.named[args[0]].arrive(32 * self.warps, args[1])
            yield None
            return 0
        if "bar.sync" in text:
            barrier = self.named[args[0]]
            before = barrier.done
            barrier.arrive(32 * self.warps, args[1])
            yield lambda: barrier.done > before
            return 0
        if "vote.sync" in text:
            return _raised(*args)
        if "raised" in text:
            sums, factor, raised = args
            return torch.where(raised != 0, sums * factor, sums)
        if "cvt.rn.satfinite.e4m3x2" in text:
            return _packed(*args)
        if "red.release" in text:
            where, number = args
            where.memory[where.at] += number
            yield None
            return 0
        if "ld.relaxed" in text:
            where, number = args
            if "look" not in text:
                return int(int(where.memory[where.at]) >= number)
            yield lambda: int(where.memory[where.at]) >= number
            return 0
        if "cp.async.bulk.wait_group 0" in text:
            self.finish_copies(0)
            return 0
        raise NotImplementedError(text)


def _raised(block_max: torch.Tensor, row_max: torch.Tensor, threshold: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``update_row_max``: a warp has 16 rows, and raises all of them or none."""
    low = (block_max - row_max > threshold).unflatten(0, (-1, 16)).any(-1).any(-1)
    low = low.repeat_interleave(16)[:, None].expand(row_max.shape)
    among = torch.where(block_max.isnan(), -torch.inf, block_max).amax(1, keepdim=True)
    raised = torch.where(low, torch.maximum(among.expand(row_max.shape), row_max), row_max)
    return raised, torch.where(low, torch.exp2(row_max - raised), 1.0), low.int()


def _packed(*values: torch.Tensor) -> torch.Tensor:
    """Four numbers a word in e4m3, the first in its lowest byte."""
    bits = [x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int() for x in values]
    return bits[0] | bits[1] << 8 | bits[2] << 16 | bits[3] << 24


def _tile(tiles: Any, at: tuple[int, ...], shape: torch.Size) -> torch.Tensor:
    """What of a tile lies inside the matrix of a TMA descriptor."""
    assert tuple(tiles.block_shape) == tuple(shape)
    matrix = tiles.base.as_strided(tuple(tiles.shape), tuple(tiles.strides), tiles.base.storage_offset())
    return matrix[at[0] : at[0] + shape[0], at[1] : at[1] + shape[1]]
