"""A few values of a tensor, and whether those of another can be the same numbers, stored in another format."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .offloading import UnreadableWeight
from .weights import has_own_storage

VALUES = 16
# Formats that values may have been rounded to before they were stored in a wider one, the coarsest first.
NARROW = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16)
# Of the largest value: a LoRA that is fused and taken out again leaves a rounding error of what it added.
SLACK_NARROW, SLACK_WIDE = 2**-10, 2**-18
# Of four bits; the finer kinds stay far below.
SLACK_QUANTISED = 1 / 4
QUANTISED = "quantised"
# Of files of format 1, which say nothing about how values were stored.
SLACK_UNKNOWN, UNKNOWN = 1 / 64, "unknown"


@dataclass(frozen=True)
class WeightSample:
    """Values at evenly spread places of a tensor.

    Attributes:
        stored: the coarsest number format that they are in, as torch names it, e.g. "bfloat16".
        values: None where a value is not a number.
    """

    stored: str
    values: tuple[float | None, ...]

    @classmethod
    def from_json(cls, data: Any) -> WeightSample:
        """From the plain data of a sample, or from a list of values alone.

        Raises:
            ValueError: it is something else; the message ends a sentence.
        """
        known = data if isinstance(data, dict) else {"stored": UNKNOWN, "values": data}
        stored, values = str(known.get("stored")), known.get("values")
        is_format = stored in (UNKNOWN, QUANTISED) or isinstance(getattr(torch, stored, None), torch.dtype)
        if not is_format or not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
            raise ValueError(f"values of a weight in a fingerprint must be a list of numbers, got {data!r}")
        return cls(stored, tuple(None if value is None else float(value) for value in values))

    def apart(self, other: WeightSample) -> tuple[float, float] | None:
        """The first pair of values that no rounding to the two formats explains; None if there is none.

        A number that is stored in two formats differs by at most half a step of each, and there is a bit for further
        roundings on the way. It may also lie beyond a format's end.
        """
        if len(self.values) != len(other.values):
            return _number(self.values[0]), _number(other.values[0])
        mine, its = _Format.of(self.stored), _Format.of(other.stored)
        peak = max((abs(value) for value in (*self.values, *other.values) if value is not None), default=0.0)
        slack = max(mine.slack, its.slack) * peak + mine.smallest + its.smallest
        for a, b in zip(self.values, other.values, strict=True):
            # Beyond its largest number a format holds that one, or no number.
            x, y = (_clamp(value, form.largest) for value, form in ((a, its), (b, mine)))
            if x is None or y is None:
                if x is y or abs(b if x is None else a) >= (mine if x is None else its).largest:  # type: ignore[arg-type]
                    continue
            elif abs(x - y) <= (mine.step + its.step) * max(abs(x), abs(y)) + slack:
                continue
            return _number(a), _number(b)
        return None

    def rounded_to(self, dtype: torch.dtype) -> WeightSample | None:
        """The same values said to be in this format; None if it does not hold them exactly."""
        if any(value is None or float(torch.tensor(value).to(dtype)) != value for value in self.values):
            return None
        return replace(self, stored=_name(dtype))


def sample(tensor: torch.Tensor, change: torch.Tensor | None = None, count: int = VALUES) -> WeightSample:
    """Values of a tensor at ``count`` places, all of them if they are fewer, with ``change`` taken off.

    Raises:
        UnreadableWeight: it is quantised in a way that is not known.
    """
    stored: str | None = None
    if has_own_storage(tensor):
        tensor, stored = tensor.dequantize(), QUANTISED
    if not tensor.is_floating_point():
        raise UnreadableWeight(f"they are quantised to {tensor.dtype}")
    values = pick(tensor, count).float()
    stored = stored or _name(_narrowest(values, tensor.dtype))
    if change is not None:
        values = values - pick(change, count).to(values.device)
    # An infinity stands for what was too large. Nine digits are a float32.
    largest = torch.finfo(values.dtype if tensor.element_size() > 4 else tensor.dtype).max
    numbers = values.clamp(-largest, largest).tolist()
    return WeightSample(stored, tuple(None if math.isnan(value) else float(f"{value:.9g}") for value in numbers))


def in_one_format(samples: Mapping[str, WeightSample], matrices: Collection[str]) -> dict[str, WeightSample]:
    """The samples of one model, those of the vectors in eight bits if all its matrices are and the vectors may be.

    A vector of numbers near one does not show by itself that it was rounded to eight bits.
    """
    formats = [getattr(torch, samples[name].stored, None) for name in matrices if name in samples]
    narrow = next((dtype for dtype in NARROW if dtype in formats), None)
    if narrow is None or not all(dtype is not None and dtype.itemsize == 1 for dtype in formats):
        return dict(samples)
    return {name: one.rounded_to(narrow) or one for name, one in samples.items()}


def pick(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """A tensor's values at ``count`` evenly spread places, as stored; all of them if they are fewer."""
    flat = tensor.detach().flatten()
    places = torch.linspace(0, flat.numel() - 1, min(count, flat.numel()), dtype=torch.float64).long().to(flat.device)
    # Devices index bytes, not all of them numbers of eight bits.
    return flat.view(torch.uint8)[places].view(flat.dtype) if flat.element_size() == 1 else flat[places]


def _narrowest(values: torch.Tensor, stored: torch.dtype) -> torch.dtype:
    """The coarsest format that holds the values exactly: what was once rounded stays so in a wider one."""
    for dtype in NARROW:
        if dtype.itemsize >= stored.itemsize:
            continue
        # Ones and zeros are in every format, and say nothing about eight bits.
        telling = dtype.itemsize > 1 or len(values.abs().unique()) >= 4
        if telling and torch.equal(values.to(dtype).float(), values):
            return dtype
    return stored


@dataclass(frozen=True)
class _Format:
    """How far a stored number may be from the one that was meant.

    Attributes:
        step: half the distance of neighbours, as a share of the number.
        smallest: the same for numbers near zero, absolute.
        slack: a share of the largest number in the tensor.
        largest: beyond which there are none.
    """

    step: float
    smallest: float
    slack: float
    largest: float

    @classmethod
    def of(cls, stored: str) -> _Format:
        if stored in (QUANTISED, UNKNOWN):
            return cls(0.0, 0.0, SLACK_QUANTISED if stored == QUANTISED else SLACK_UNKNOWN, math.inf)
        dtype: torch.dtype = getattr(torch, stored)
        info = torch.finfo(dtype)
        # A LoRA that is fused and taken out again rounds twice more, to a format of at least 16 bits.
        return cls(
            step=info.eps / 2 * (3 if dtype.itemsize > 1 else 1.25),
            smallest=info.smallest_normal * info.eps / 2,
            slack=SLACK_NARROW if dtype.itemsize < 4 else SLACK_WIDE,
            largest=info.max,
        )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _clamp(value: float | None, largest: float) -> float | None:
    return None if value is None else min(max(value, -largest), largest)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
