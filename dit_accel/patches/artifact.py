"""What a calibration found, as a file: safetensors with a JSON header, never pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import written_whole
from ..layout import TokenLayout
from ..names import MissingName
from ..plain_data import as_plain, first_difference
from ..recipe import Recipe
from ..stages.order.axes import AxisOrder
from ..stages.select.frozen import FrozenMasks
from ..tensor_files import save_tensors
from .fingerprint import Fingerprint

FORMAT = "dit_accel.calibration"
VERSION = 1


@dataclass(frozen=True, eq=False)
class CalibratedTransformer:
    """One transformer's part.

    Attributes:
        fingerprint: of the model it belongs to.
        recipe: the calibrated recipe with what was chosen filled in, for example axis orders.
        masks: per noise level, layer and head.
    """

    fingerprint: Fingerprint
    recipe: Recipe
    masks: FrozenMasks


@dataclass(frozen=True, eq=False)
class CalibrationArtifact:
    """Plans made offline, found by noise level.

    Attributes:
        recipe: what was calibrated.
        transformers: by name in the pipeline ("" for a bare transformer).
        facts: plain data on how: scheduler, sigmas, prompts, seeds, versions.
    """

    recipe: Recipe
    transformers: Mapping[str, CalibratedTransformer]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write the file; a file that is there is replaced at the end, not half-way.

        Raises:
            ValueError: the file cannot be written.
        """
        path = Path(path)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "recipe": self.recipe.to_dict(),
            "facts": dict(self.facts),
            "transformers": {
                name: {
                    "fingerprint": part.fingerprint.to_dict(),
                    "recipe": part.recipe.to_dict(),
                    "grid": part.masks.layout.grid,
                    "latent_start": part.masks.layout.latent_start,
                    "seq_len": part.masks.layout.seq_len,
                    "references": [[*part.grid, part.start] for part in part.masks.layout.references],
                    "queries": part.masks.layout.queries,
                    "block": part.masks.block,
                    "edges": part.masks.edges,
                }
                for name, part in self.transformers.items()
            },
        }
        tensors = {_key(name): part.masks.bits.contiguous() for name, part in self.transformers.items()}
        write_tensors(path, tensors, header)
        return path

    @classmethod
    def load(cls, path: str | Path) -> CalibrationArtifact:
        """Read a file.

        Raises:
            ValueError: not a calibration, or one of another version; the message names the file.
        """
        header, tensors = read_tensors(Path(path))
        if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"{path} is no calibration of version {VERSION}: it says {header.get('format')!r}, version "
                f"{header.get('version')!r}."
            )
        try:
            parts = {name: _part(data, tensors[_key(name)]) for name, data in header["transformers"].items()}
            if not parts:
                raise ValueError("it is for no transformer")
            return cls(Recipe.from_dict(header["recipe"]), parts, dict(header["facts"]))
        except MissingName as error:
            raise MissingName(f"The calibration {path} is of a recipe that is not at hand: {error}") from error
        except KeyError as error:
            raise ValueError(f"{path} is a damaged calibration: it lacks {error}.") from error
        except (TypeError, IndexError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path} is a damaged calibration: {error}") from error

    def part_for(self, name: str, model: nn.Module, attentions: Mapping[str, nn.Module]) -> CalibratedTransformer:
        """The part of a transformer.

        Raises:
            ValueError: there is none, or the model is another one; the message says what differs.
        """
        # A transformer alone and the only one of a pipeline are the same.
        part = self.transformers.get(name)
        if part is None and len(self.transformers) == 1 and name in ("", "transformer"):
            part = next(iter(self.transformers.values()))
        if part is None:
            raise ValueError(f"The calibration is for {', '.join(self.transformers)}, the pipeline has {name!r}.")
        difference = part.fingerprint.difference(model, attentions)
        if difference is not None:
            raise ValueError(f"The calibration does not fit: {difference}.")
        return part

    def recipe_for(self, part: CalibratedTransformer, asked: Recipe, rederive: bool) -> tuple[Recipe, bool]:
        """The recipe to run, and whether the masks hold for it.

        Order and selection make the masks and must be the calibrated ones; the other axes may differ.

        Raises:
            ValueError: they are others, and ``rederive`` is not set; the message names the first.
        """
        made, wanted = (
            {axis: recipe.to_dict()[axis] for axis in ("order", "select")} for recipe in (self.recipe, asked)
        )
        differs = first_difference(as_plain(made), as_plain(wanted))
        if differs is not None and not rederive:
            raise ValueError(
                f"The calibration is for another recipe: {differs}. Calibrate again, or patch with rederive=True to "
                "keep what still holds and select anew."
            )
        order = part.recipe.order if asked.order == self.recipe.order else asked.order
        if order.needs_calibration:
            if not isinstance(part.recipe.order, AxisOrder):
                raise ValueError("The calibration has no axis orders for this recipe.")
            order = part.recipe.order
        select = part.recipe.select if differs is None else asked.select
        return replace(asked, order=order, select=select), differs is None


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
    """Write safetensors with a JSON header, whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    with written_whole(path) as draft:
        save_tensors(draft, tensors, {"dit_accel": json.dumps(header)})


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of a file of :func:`write_tensors`.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise ValueError(f"There is no calibration at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["dit_accel"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError as error:
        raise ValueError(f"{path} is no calibration file: it has no header of dit_accel.") from error
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no calibration file: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no calibration file: its header is a {type(header).__name__}, not an object.")
    return header, tensors


def _part(data: Mapping[str, Any], bits: torch.Tensor) -> CalibratedTransformer:
    """One transformer's part from its header, which may be damaged."""
    fingerprint = Fingerprint.from_dict(data["fingerprint"])
    block_q, block_k = numbers = data["block"]
    if any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"block must be counts of at least 1, got {numbers}.")
    # Files from before references and queries have none.
    references = [number for part in data.get("references", []) for number in part]
    queries = data.get("queries") or ()
    layout = TokenLayout.from_numbers([*data["grid"], data["latent_start"], data["seq_len"], *references, *queries])
    edges = tuple(map(float, data["edges"]))
    if not all(left > right for left, right in pairwise(edges)):
        raise ValueError(f"edges must fall, got {edges}.")
    masks = FrozenMasks(layout, (block_q, block_k), edges, bits)
    if tuple(bits.shape[1:3]) != (fingerprint.layers, fingerprint.heads):
        raise ValueError(
            f"masks of {fingerprint.layers} layers and {fingerprint.heads} heads are expected, got {tuple(bits.shape)}."
        )
    return CalibratedTransformer(fingerprint, Recipe.from_dict(data["recipe"]), masks)


def _key(name: str) -> str:
    return f"{name}.masks" if name else "masks"
