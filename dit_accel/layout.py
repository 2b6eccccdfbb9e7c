"""Where the latent tokens sit in a sequence, and where a call sits in the denoising trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class LatentGrid:
    """A raster of latent tokens: token ``(f, h, w)`` of ``(F, H, W)`` sits at ``start + (f * H + h) * W + w``.

    Attributes:
        grid: frames, height and width in tokens (after patchify); an image has one frame.
        start: position of the first token.
    """

    grid: Grid
    start: int

    def __post_init__(self) -> None:
        if min(self.grid) < 1:
            raise ValueError(f"A latent grid needs at least one token per dimension, got {self.grid}.")

    @property
    def tokens(self) -> int:
        return prod(self.grid)

    @property
    def stop(self) -> int:
        """Position behind the last token."""
        return self.start + self.tokens


@dataclass(frozen=True)
class TokenLayout:
    """One attention sequence: a latent grid, grids of references, and other tokens (text, audio, padding) around them.

    Selection acts on pairs of tokens that lie on a grid; every other token reads and is read in full.

    Attributes:
        grid: latent frames, height and width in tokens of what is generated; an image has one frame.
        latent_start: position of the first latent token.
        seq_len: tokens in the whole sequence.
        references: grids of further latents (images to edit, earlier frames), in the order of the sequence.
        queries: first and number of the tokens that query, where others are keys alone; None where all query.
        padding: tokens at the end of the sequence that stand for nothing and that nobody sees: they fill blocks.
    """

    grid: Grid
    latent_start: int
    seq_len: int
    references: tuple[LatentGrid, ...] = ()
    queries: tuple[int, int] | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        end = 0
        for part in sorted(self.grids, key=lambda part: part.start):
            if part.start < end:
                raise ValueError(f"A grid of {part.grid} starting at token {part.start} overlaps one before it.")
            end = part.stop
            if end > self.seq_len - self.padding:
                raise ValueError(
                    f"A grid of {part.grid} starting at token {part.start} does not fit a sequence of "
                    f"{self.seq_len} tokens."
                )
        first, number = self.queries or (0, self.seq_len)
        if first < 0 or number < 1 or first + number > self.seq_len:
            raise ValueError(f"{number} queries from token {first} do not fit a sequence of {self.seq_len} tokens.")

    @property
    def grids(self) -> tuple[LatentGrid, ...]:
        """What is generated, then the references."""
        return LatentGrid(self.grid, self.latent_start), *self.references

    @property
    def num_latent(self) -> int:
        """Tokens of what is generated."""
        return prod(self.grid)

    @property
    def num_on_grids(self) -> int:
        """Tokens of what is generated and of references."""
        return sum(part.tokens for part in self.grids)

    @property
    def num_extra(self) -> int:
        """Tokens that are on no grid, without padding."""
        return self.seq_len - self.padding - self.num_on_grids

    @property
    def forced_share(self) -> float:
        """Share of all query-key pairs with a token that is on no grid: they are read in full."""
        return 1.0 - (self.num_on_grids / (self.seq_len - self.padding)) ** 2

    def to_numbers(self) -> list[int]:
        """Plain numbers for a file: grid, start, length, four of each reference, two of queries where not all do."""
        references = [number for part in self.references for number in (*part.grid, part.start)]
        return [*self.grid, self.latent_start, self.seq_len, *references, *(self.queries or ())]

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> TokenLayout:
        """From what :meth:`to_numbers` gave.

        Raises:
            ValueError: they are not such numbers.
        """
        if len(numbers) < 5 or len(numbers) % 4 not in (1, 3) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(
                f"A layout must be counts, five, four of each reference, two of queries or none, got {list(numbers)}."
            )
        queries = (numbers[-2], numbers[-1]) if len(numbers) % 4 == 3 else None
        frames, height, width, start, length, *rest = numbers[: len(numbers) - len(queries or ())]
        parts = zip(rest[::4], rest[1::4], rest[2::4], rest[3::4], strict=True)
        references = tuple(LatentGrid((f, h, w), at) for f, h, w, at in parts)
        return cls((frames, height, width), start, length, references, queries)

    def __str__(self) -> str:
        frames, height, width = self.grid
        others = "".join(f", a reference of {'x'.join(map(str, part.grid))}" for part in self.references)
        asked = "" if self.queries is None else f", {self.queries[1]} queries from token {self.queries[0]}"
        grid = f"a latent grid of {frames}x{height}x{width} from token {self.latent_start} of {self.seq_len}"
        return f"{grid}{others}{asked}"

    def padded(self, padding: int) -> TokenLayout:
        """The same sequence with so many tokens of padding behind it."""
        return replace(self, seq_len=self.seq_len + padding, padding=self.padding + padding)

    def without_references(self) -> TokenLayout:
        """The same sequence with references as other tokens, which read and are read in full."""
        return replace(self, references=()) if self.references else self


@dataclass(frozen=True)
class StepContext:
    """Where one transformer forward sits in the denoising trajectory.

    Attributes:
        index: denoising step, from 0; None outside a pipeline run, and where a pipeline does not show it.
        num_steps: steps of the run; None where there is no index.
        sigma: noise level of the step where the scheduler has one.
        branch: guidance branch: the pipeline's name for it ("cond", "uncond", ...), or the ordinal of the forward
            within its step ("#0", "#1") where it has no name; None outside a pipeline run. Where a layer attends
            sample by sample, the second call's ends in "[1]", and so on.
        forward_id: counts the forwards of this transformer, so that a plan knows its age.
        computed: forwards of this branch, in this run before this one, that ran all blocks; None where all do.
        guided: whether the pipeline says that it also runs a branch without the prompt; models distilled to few steps
            have none.
        sigmas: noise levels of all steps of the run, and mostly the one behind the last; empty where the scheduler
            has none.
    """

    index: int | None = None
    num_steps: int | None = None
    sigma: float | None = None
    branch: str | None = None
    forward_id: int = 0
    computed: int | None = None
    guided: bool = False
    sigmas: tuple[float, ...] = field(default=(), repr=False, compare=False)

    @property
    def lengths(self) -> tuple[float, ...]:
        """How far each step of the run goes in noise level; 1 each where that is not known."""
        count = self.num_steps or 0
        if len(self.sigmas) <= count:
            return (1.0,) * count
        return tuple(abs(now - then) for now, then in pairwise(self.sigmas[: count + 1]))

    @property
    def progress(self) -> float | None:
        """Share of the steps already done, in [0, 1); None outside a pipeline run."""
        if self.index is None or not self.num_steps:
            return None
        return self.index / self.num_steps
