"""Adapters: what a fine-tuning learned, saved apart from the model it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..api import patch
from ..files import refuse_unwritable_folder
from ..patches.fingerprint import Fingerprint
from ..patches.handle import PatchHandle
from ..patches.learned import is_learned
from ..patches.targets import handle_of, self_attentions, transformers_of
from ..patches.weights import plain_name, stored_parameters, unfused
from ..pipelines.companion import ADAPTERS, absent, adapters
from ..presets import resolve
from ..recipe import Recipe
from .accepted import other_recipe
from .adapter_files import BACKBONES, AdapterFiles, read_adapter, to_integers, write_adapter
from .adapter_load import LoadPlan
from .few_steps import FewSteps
from .lora import lora_state
from .published.convert import as_adapter
from .published.files import find_checkpoint, is_own, read_parts
from .published.formats import Published, read_published


@dataclass(frozen=True, eq=False)
class _Part:
    """One transformer's share of an adapter."""

    name: str
    model: Any
    attentions: dict[str, nn.Module]


def save_adapter(
    pipe: Any,
    folder: str | Path,
    *,
    transformer: str | None = None,
    backbone: str = "none",
    trained: Iterable[str] = (),
    base: Mapping[str, torch.Tensor] | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    summary: Mapping[str, Any] | None = None,
    steps: FewSteps | None = None,
) -> Path:
    """Save what was trained: a recipe's learned parameters, and changed weights of the model.

    The folder gets ``adapter.safetensors`` and a card, ``adapter.json``: recipe, fingerprint of the model,
    training summary.

    Args:
        pipe: a patched pipeline or transformer.
        folder: made if needed.
        transformer: the one of the pipeline to save, "transformer" or "transformer_2"; None saves all.
        backbone: what is saved of the model's own weights: "none"; "full", the ``trained`` parameters;
            "delta", their difference to ``base``; "lora", the LoRA layers that are in the model (peft).
        trained: names of the changed parameters, as ``named_parameters`` of the transformer has them.
        base: their values before the training, for "delta".
        values: parameters to save in place of the model's present ones, by name, e.g. averaged ones.
        dtype: of the saved backbone tensors; None keeps theirs. ``torch.int8`` stores the matrices of a delta as
            integers with one float32 scale a row, half of what bfloat16 takes. Learned parameters stay as they are.
        summary: of the training, plain data, kept in the card.
        steps: that the model was distilled to; loading the adapter gives the pipeline a scheduler of them.

    Returns:
        The folder.

    Raises:
        ValueError: the pipeline is not patched, or the arguments do not fit together.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}.")
    if dtype == torch.int8 and backbone != "delta":
        raise ValueError(f"dtype int8 is for backbone 'delta', got {backbone!r}.")
    handle, parts, trained = handle_of(pipe), _parts(pipe), list(trained)
    if transformer is not None and len(parts) > 1:
        found = [part.name for part in parts]
        parts = [part for part in parts if part.name == transformer]
        if not parts:
            raise ValueError(f"{type(pipe).__name__} has no {transformer!r}; it has {', '.join(found)}.")
    if len(parts) > 1 and (trained or values):
        raise ValueError(f"Trained weights are of one transformer, name it; the pipeline has {len(parts)}.")
    missing = [name for name in trained if backbone == "delta" and name not in (base or {})]
    if missing:
        raise ValueError(f"backbone 'delta' needs the base values of all trained parameters; {missing[0]} is missing.")
    folder = Path(folder)
    refuse_unwritable_folder(folder)
    tensors: dict[str, torch.Tensor] = {}
    fingerprints: dict[str, Any] = {}
    lora: dict[str, Any] = {}
    for part in parts:
        stored, given = stored_parameters(part.model), dict(values or {})

        def value_of(name: str, stored: Any = stored, given: Mapping[str, torch.Tensor] = given) -> torch.Tensor:
            value = given.get(name)
            return stored[name].read() if value is None else value.detach()

        unknown = [name for name in trained if name not in stored and name not in given]
        if unknown:
            raise ValueError(f"{type(part.model).__name__} has no parameter {unknown[0]}.")
        saved = {f"learned/{plain_name(n)}": value_of(n) for n in (*stored, *given) if is_learned(n)}
        if backbone in ("full", "delta"):
            first = unfused(part.model, {name: (base or {})[name] for name in trained if backbone == "delta"})
            for name, value in unfused(part.model, {name: value_of(name) for name in trained}).items():
                if backbone == "delta":
                    value = value.float() - first[name].detach().to(value.device).float()
                if dtype == torch.int8 and value.dim() > 1:
                    value, saved[f"scale/{name}"] = to_integers(value)
                elif dtype is not None and dtype != torch.int8:
                    value = value.to(dtype)
                saved[f"{backbone}/{name}"] = value
        elif backbone == "lora":
            state, lora[part.name] = lora_state(part.model, value_of)
            saved |= {f"lora/{n}": v if dtype is None else v.to(dtype) for n, v in state.items()}
        tensors |= {f"{part.name}/{n}": v.detach().cpu().contiguous().clone() for n, v in saved.items()}
        fingerprint = Fingerprint.of(part.model, part.attentions, trained, base, values)
        fingerprints[part.name] = fingerprint.to_dict()
    from .. import __version__

    card = {
        "dit_accel": __version__,
        "recipe": handle.recipe.to_dict(),
        "base": fingerprints,
        "backbone": backbone,
        "lora": lora,
        "training": dict(summary or {}),
        **({} if steps is None else {"steps": asdict(steps)}),
    }
    write_adapter(folder, tensors, card)
    return folder


def load_adapter(
    pipe: Any,
    path_or_repo: str | Path,
    *,
    backend: str = "auto",
    recipe: Recipe | str | None = None,
    transformer: str | None = None,
) -> PatchHandle:
    """Put an adapter or a published checkpoint into a pipeline: patch it with its recipe, and load what was trained.

    A pipeline that is patched already keeps its recipe. An adapter may run in another precision, at another density,
    and with another schedule or reuse than it was trained with; the summary says so. Removing the patch also takes the
    adapter out: changed weights come back as the tensors they were.

    Read are this package's own adapters, and by the names and shapes of their tensors FastWan's VSA gates
    (github.com/hao-ai-lab/FastVideo), SLA's and TurboDiffusion's projections (github.com/thu-ml/SLA,
    github.com/thu-ml/TurboDiffusion), LoRAs distilled to few steps or for sparse attention
    (github.com/ModelTC/LightX2V), and whole models under Wan's own names (github.com/NVlabs/rcm). See
    :mod:`dit_accel.training.published.formats`. Where the steps that a checkpoint was distilled to are known, the
    pipeline gets a scheduler of them until the patch is removed. A checkpoint of whole weights keeps the former ones
    beside them until then.

    Args:
        pipe: the pipeline or transformer that it was trained on.
        path_or_repo: a folder written by :func:`save_adapter`, a file or folder of a published checkpoint, or a
            repository on the Hugging Face hub, as ``owner/name`` or ``owner/name/file.safetensors``; or the name of
            an adapter of the built-in model, such as ``"sla-0.1"``.
        backend: see :func:`~dit_accel.patch`; for a pipeline that is not patched yet.
        recipe: in place of the adapter's own, a recipe or a preset's name. What runs a checkpoint that holds nothing
            sparse; without it that is the model's own attention.
        transformer: of a pipeline with two experts the one that a published checkpoint is for, where its files do not
            say.

    Raises:
        ValueError: not an adapter, or one for another model, recipe or head count; the message names what
            differs. Nothing has been touched then.
    """
    path = _built_in(path_or_repo) or find_checkpoint(path_or_repo)
    chosen = None if recipe is None else resolve(recipe)
    if not is_own(path):
        return _load_published(pipe, path, str(path_or_repo), backend, chosen, transformer)
    files = read_adapter(path)
    parts, name = _fitting_parts(pipe, files), f"the adapter in {path}"
    handle = _put_in(pipe, [(part, files) for part in parts], backend, files.recipe, chosen, name[0].upper() + name[1:])
    take_steps(pipe, handle, files.steps, name)
    return handle


def _built_in(name: str | Path) -> Path | None:
    """The folder of an adapter of the built-in model; None for what is no such name, or lies in the way."""
    if str(name) not in ADAPTERS or Path(name).exists():
        return None
    folder = adapters().get(str(name))
    if folder is None:
        raise ValueError(absent(f"The adapter {str(name)!r}"))
    return folder


def _load_published(
    pipe: Any, path: Path, name: str, backend: str, chosen: Recipe | None, transformer: str | None
) -> PatchHandle:
    parts = {part.name: part for part in _parts(pipe)}
    found: list[tuple[_Part, Published]] = []
    for saved_as, tensors in read_parts(path).items():
        wanted = transformer or saved_as or (next(iter(parts)) if len(parts) == 1 else None)
        if wanted is None:
            raise ValueError(f"{name} does not say which of {', '.join(parts)} it is for, give transformer=.")
        if wanted not in parts:
            raise ValueError(f"{name} is for {wanted!r}, {type(pipe).__name__} has {', '.join(parts)}.")
        found.append((parts[wanted], read_published(tensors, name)))
    trained = next((published.recipe for _, published in found if published.recipe is not None), None)
    own = trained or chosen or _recipe_of(pipe) or Recipe()
    converted = [
        (part, as_adapter(published, part.name, part.model, part.attentions, own, name)) for part, published in found
    ]
    handle = _put_in(pipe, converted, backend, own, chosen, name)
    take_steps(pipe, handle, next((one.steps for _, one in found if one.steps is not None), None), name)
    return handle


def take_steps(pipe: Any, handle: PatchHandle, steps: FewSteps | None, name: str) -> None:
    """A scheduler of the steps that a checkpoint was distilled to, until the patch is removed."""
    if steps is None or not hasattr(pipe, "scheduler"):
        return
    from .published.scheduler import few_step_scheduler

    before, pipe.scheduler = pipe.scheduler, few_step_scheduler(steps)
    handle.schedules.add_begun(pipe)
    handle.record_change(
        partial(setattr, pipe, "scheduler", before),
        f"{len(steps.sigmas)} steps at the noise levels {name} was distilled to; it needs no guidance.",
    )


def _recipe_of(pipe: Any) -> Recipe | None:
    try:
        return handle_of(pipe).recipe
    except ValueError:
        return None


def _put_in(
    pipe: Any,
    adapters: Sequence[tuple[_Part, AdapterFiles]],
    backend: str,
    trained: Recipe,
    chosen: Recipe | None,
    name: str,
) -> PatchHandle:
    """Patch where nobody has, and load each transformer's adapter; nothing has been touched after an error."""
    used = _recipe_of(pipe) or chosen or trained
    refused, sentences = other_recipe(trained, used)
    if chosen is not None and chosen != used:
        raise ValueError("The pipeline is patched with another recipe than the one given; call unpatch(pipe) first.")
    if refused is not None:
        raise ValueError(f"{name} is for another recipe: {refused}.")
    if _recipe_of(pipe) is None:
        handle, patched_here = patch(pipe, used, backend=backend), True
    else:
        handle, patched_here = handle_of(pipe), False
    try:
        plans = [LoadPlan(part.name, part.model, files) for part, files in adapters]
        undo: list[Callable[[], None]] = []
        try:
            for plan in plans:
                plan.apply(undo)
        except BaseException:
            while undo:
                undo.pop()()
            raise
    except BaseException:
        if patched_here:
            handle.remove()
        raise
    for step in undo:
        handle.record(step)
    handle.changes.extend(sentences)
    return handle


def _parts(pipe: Any) -> list[_Part]:
    return [
        _Part(name or "transformer", model, dict(self_attentions(model, family)))
        for name, model, family in transformers_of(pipe)
    ]


def _fitting_parts(pipe: Any, files: AdapterFiles) -> list[_Part]:
    """The transformers that an adapter is for.

    Raises:
        ValueError: there are others, or with other weights.
    """
    parts, names = _parts(pipe), list(files.base)
    if len(parts) == len(names) == 1:
        parts = [_Part(names[0], parts[0].model, parts[0].attentions)]
    if missing := set(names) - {part.name for part in parts}:
        raise ValueError(
            f"The adapter in {files.folder} is for the transformers {', '.join(names)}, the pipeline has "
            f"{', '.join(part.name for part in parts)}, not {', '.join(sorted(missing))}."
        )
    # Of two experts each may have an adapter of its own; they are loaded one after the other.
    parts = [part for part in parts if part.name in names]
    for part in parts:
        difference = files.base[part.name].difference(part.model, part.attentions)
        if difference is not None:
            raise ValueError(f"The adapter in {files.folder} does not fit {type(part.model).__name__}: {difference}.")
    return parts
