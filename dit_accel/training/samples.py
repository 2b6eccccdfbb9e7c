"""Training samples as files: latents and the conditioning that a transformer's forward takes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..tensor_files import write_tensors

logger = logging.getLogger("dit_accel")


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample, as the transformer sees it.

    Attributes:
        name: for messages.
        latents: clean, ``[1, ...]`` in the layout of the forward's ``hidden_states``.
        timestep_scale: factor from sigma to the forward's ``timestep``.
        condition: all other arguments of the forward: tensors, tuples of tensors, plain values.
        noised: of a model that takes a timestep for each token or frame, ``[1, N]``: 1 where it is noised, 0 where it
            stays clean, as a first frame that is given does. None: one timestep a sample.
        unconditional: the arguments without the prompt, for a teacher with guidance; only those that differ.
    """

    name: str
    latents: torch.Tensor
    timestep_scale: float
    condition: dict[str, Any]
    noised: torch.Tensor | None = None
    unconditional: dict[str, Any] | None = None


@dataclass(frozen=True)
class Skipped:
    """A file that could not be used, and why."""

    name: str
    reason: str


def save_sample(sample: Sample, path: Path) -> None:
    """Write a sample as safetensors, whole or not at all; :func:`read_sample` is the inverse.

    Raises:
        ValueError: the file cannot be written, or a condition cannot be saved.
    """
    tensors = {"latents": sample.latents}
    if sample.noised is not None:
        tensors["noised"] = sample.noised
    metadata = {"name": sample.name, "timestep_scale": repr(sample.timestep_scale)}
    try:
        for kind, values in (("condition", sample.condition), ("unconditional", sample.unconditional)):
            if values is not None:
                found, about = _split(kind, values)
                tensors |= found
                metadata |= about
    except TypeError as error:
        raise ValueError(f"The forward's arguments cannot be saved: {error}.") from error
    write_tensors(path, tensors, metadata)


def read_sample(path: Path) -> Sample:
    """Read a sample.

    Raises:
        ValueError: the file is missing, broken, or no sample.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        latents, noised = tensors.pop("latents"), tensors.pop("noised", None)
        condition = _join("condition", tensors, metadata)
        without = _join("unconditional", tensors, metadata) if "unconditional.plain" in metadata else None
        return Sample(metadata["name"], latents, float(metadata["timestep_scale"]), condition, noised, without)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path.name} is no readable sample: {error}") from error


# Keys of the metadata of a sample's arguments: the first two are older than a second kind of them.
_ABOUT = {
    "condition": ("plain", "tuples"),
    "unconditional": ("unconditional.plain", "unconditional.tuples"),
}


def _split(kind: str, values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Arguments as tensors and metadata of a file; :func:`_join` is the inverse."""
    tensors: dict[str, torch.Tensor] = {}
    plain, sizes = {}, {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            tensors[f"{kind}.{name}"] = value
        elif isinstance(value, (tuple, list)) and value and all(isinstance(v, torch.Tensor) for v in value):
            sizes[name] = len(value)
            tensors |= {f"{kind}.{name}.{i}": v for i, v in enumerate(value)}
        else:
            plain[name] = value
    return tensors, dict(zip(_ABOUT[kind], (json.dumps(plain), json.dumps(sizes)), strict=True))


def _join(kind: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Any]:
    plain, tuples = _ABOUT[kind]
    values: dict[str, Any] = json.loads(metadata[plain])
    for name, size in json.loads(metadata[tuples]).items():
        values[name] = tuple(tensors.pop(f"{kind}.{name}.{i}") for i in range(size))
    own = [name for name in tensors if name.startswith(f"{kind}.")]
    return values | {name.removeprefix(f"{kind}."): tensors.pop(name) for name in own}


def sample_files(folder: Path) -> list[Path]:
    """Files of samples in a folder, in order; not the hidden ones, which a killed process left half written."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))


def is_sample(path: Path) -> bool:
    """Whether a whole sample stands at ``path``; its tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {"timestep_scale", "plain", "tuples"} <= (file.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


class LatentFolder:
    """The samples of a folder, read when asked for.

    Files that cannot be opened are named on stderr and left out; ``skipped`` keeps them.

    Raises:
        ValueError: there is no folder, or no usable sample in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"There is no folder {folder}.")
        self.paths: list[Path] = []
        self.skipped: list[Skipped] = []
        for path in sample_files(self.folder):
            try:
                read_sample(path)
                self.paths.append(path)
            except ValueError as error:
                self.skipped.append(Skipped(path.name, str(error)))
        report_skipped(self.skipped, len(self.skipped) + len(self.paths))
        if not self.paths:
            raise ValueError(f"{folder} holds no usable sample (*.safetensors).")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return read_sample(self.paths[index])


def report_skipped(skipped: Sequence[Skipped], total: int) -> None:
    """Name what was left out, with the count last, as warnings."""
    for item in skipped:
        logger.warning("Skipped %s: %s", item.name, item.reason)
    if skipped:
        logger.warning("Skipped %d of %d files.", len(skipped), total)


def collate(
    samples: Sequence[Sample], device: torch.device, unconditional: bool = False
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents ``[B, ...]`` and conditioning of a batch, on a device.

    Tensors with a leading batch dimension of 1 are joined; others (position ids) belong to all samples alike.

    Args:
        unconditional: the conditioning without the prompts, which the samples must have.

    Raises:
        ValueError: samples of different sizes or conditions, see :func:`refuse_mixed`.
    """
    refuse_mixed(samples)

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, torch.Tensor):
            batched = first.dim() > 0 and first.shape[0] == 1
            return (torch.cat(list(values)) if batched else first).to(device)
        if isinstance(first, (tuple, list)) and first and isinstance(first[0], torch.Tensor):
            return tuple(join(items) for items in zip(*values, strict=True))
        return first

    given = [{**s.condition, **(s.unconditional or {})} if unconditional else s.condition for s in samples]
    condition = {name: join([values[name] for values in given]) for name in given[0]}
    return torch.cat([sample.latents for sample in samples]).to(device), condition


def refuse_mixed(samples: Sequence[Sample]) -> None:
    """Check that samples can make one batch.

    Raises:
        ValueError: their latents or conditions have different shapes, or plain conditions differ.
    """
    for sample in samples[1:]:
        mine, others = _shapes(samples[0]), _shapes(sample)
        for name in [*mine, *others]:
            if mine.get(name) != others.get(name):
                raise ValueError(
                    f"Samples of one batch must have one size, got {name} {mine.get(name)} in {samples[0].name} and "
                    f"{others.get(name)} in {sample.name}; use batch_size 1."
                )


def _shapes(sample: Sample) -> dict[str, Any]:
    def shape(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return list(value.shape)
        return [shape(item) for item in value] if isinstance(value, (tuple, list)) else value

    return {
        "latents": shape(sample.latents),
        **{name: shape(value) for name, value in sample.condition.items()},
        "noised": None if sample.noised is None else sample.noised.tolist(),
        **{f"unconditional {name}": shape(value) for name, value in (sample.unconditional or {}).items()},
    }


def spread_over(noised: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The noised parts ``[B, N]`` of tokens or frames, for every value of latents of a shape, to broadcast.

    Raises:
        ValueError: N is neither the tokens of the latents, nor their frames, nor square patches of the frames.
    """
    batch, count = noised.shape
    if len(shape) == 3 and count == shape[1]:
        return noised[..., None]
    if len(shape) == 5:
        frames, height, width = shape[-3:]
        if count == frames:
            return noised.view(batch, 1, frames, 1, 1)
        patch = math.isqrt(max(1, frames * height * width // count))
        if count * patch * patch == frames * height * width and height % patch == width % patch == 0:
            patches = noised.view(batch, 1, frames, height // patch, width // patch)
            return patches.repeat_interleave(patch, 3).repeat_interleave(patch, 4)
    raise ValueError(f"{count} timesteps a sample are of no tokens or frames of latents {list(shape)}.")
