"""Which forwards run all blocks, and what a guidance branch of a run keeps for those that do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import CacheContext, StateManager
from torch import nn

from ...layout import StepContext
from ...stages.reuse.protocol import Reuse, Surroundings
from ..ambient import LatentTokens
from ..families.family import PatchSize
from ..forwards import Forward
from .together import Together

if TYPE_CHECKING:
    from ..session import Session

# Beginnings of the names of arguments that hold what a prompt or a picture says, the same at every step.
_CONDITIONS = (
    "encoder_",
    "pooled_",
    "text",
    "txt",
    "prompt",
    "cap",
    "image_embeds",
    "attention_kwargs",
    "joint_",
    "input_ids",
    "y",
)


_NESTS = (list, tuple, dict)

Conditions = dict[str, list[tuple[torch.Tensor, int]]]
"""Arguments of a forward: their tensors, and the versions of these."""


@dataclass(eq=False)
class BranchReuse:
    """What one guidance branch of a run keeps.

    Attributes:
        states: of diffusers' hooks, by their manager.
        conditions: what the latest forward was given beside latents and timestep, with the tensors' versions.
        index: its step.
        made: the latest step at which layers made plans that are kept.
        computed: forwards that ran all blocks.
        under_way: a forward has begun and has not ended: it failed if another one begins.
    """

    states: dict[int, Any] = field(default_factory=dict)
    conditions: Conditions = field(default_factory=dict)
    index: int | None = None
    made: StepContext | None = None
    computed: int = 0
    under_way: bool = False


@dataclass(eq=False)
class LeadingBranch:
    """The branch that ran first in a step of a run, from which others may take.

    Attributes:
        index: the step.
        branch: what it keeps.
        latents: what it was given, with the tensors' versions.
        followers, before: how many others came behind it in this step, and in the one before.
        shared: some did in this run.
    """

    index: int | None = None
    branch: BranchReuse | None = None
    latents: Conditions = field(default_factory=dict)
    followers: int = 0
    before: int = 0
    shared: bool = False

    def release(self, ended: BranchReuse) -> None:
        """Free what branches keep when one of them has ended its run's last forward: the first once nobody is expected
        to take from it."""
        leads = ended is self.branch
        if not leads or not self.before:
            ended.states.clear()
        if not leads and self.branch is not None and self.followers >= self.before:
            self.branch.states.clear()


@dataclass(eq=False)
class ForwardReuse:
    """The forward under way.

    Attributes:
        first: the branch that runs first in each step; None where none takes from another.
        leading: what it keeps, where it was given the same latents; None for that branch itself.
        forced: it runs all blocks, whatever the cache would decide.
        plans: layers make plans that are kept.
        together: processes that must skip the same blocks.
        device: where these speak to each other.
        latents: what is denoised, for caches that look at it.
        begun: managers whose states have been told of it.
        calls: blocks that ran.
        skipped: some block did not.
    """

    branch: BranchReuse
    first: LeadingBranch | None
    leading: BranchReuse | None
    step: StepContext
    forced: bool
    plans: bool
    together: Together
    device: torch.device
    latents: list[torch.Tensor] | None = None
    begun: set[int] = field(default_factory=set)
    calls: int = 0
    skipped: bool = False


class ReuseTracker:
    """Reuse in one transformer, in all threads.

    Args:
        session: knows the forwards.
        stage: the recipe's choice.

    Attributes:
        computed, skipped: forwards that ended, of which all blocks ran, or some did not.
        root_hooks: of diffusers, around the whole forward.
    """

    def __init__(self, session: Session, stage: Reuse) -> None:
        self.session = session
        self.stage = stage
        self.computed = 0
        self.skipped = 0
        self.root_hooks: list[Any] = []
        self.around = Surroundings(
            step=lambda: self._now().step,
            latents=lambda: self._now().latents,
            total=lambda own: self._now().together.total(own),
            any=lambda own: self._now().together.any(own, self._now().device),
        )
        self._counting = threading.Lock()

    @property
    def current(self) -> ForwardReuse | None:
        """This thread's forward; None where blocks run as if nothing were ever reused."""
        forward = self.session.forward
        return None if forward is None else forward.reuse

    def begin(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Called when an eager forward has begun, and its step is known."""
        forward, engine = self.session.forward, self.session.engine
        if forward is None or not engine.switched_on:
            return
        if getattr(model, "_is_cached", False):  # cache-dit's mark: patching refuses it, and it may come later
            raise ValueError(
                f"A cache of another package was enabled on {type(model).__name__} beside the recipe's own reuse, and "
                "two would answer for each other: disable it, or patch with reuse none."
            )
        latents = None
        if self.stage.needs_latents:
            latents = _latents(self.session.patch_size, forward.latents, arguments.get("hidden_states"))
        why_not = self._why_not(forward, arguments, latents)
        if why_not is not None:
            engine.note(f"Nothing is reused across steps: {why_not}")
            return
        forward.reuse = self._of_branch(forward, arguments, Together.of(model))
        forward.reuse.latents = latents
        for hook in self.root_hooks:
            hook.pre_forward(model)

    def end(self, model: nn.Module) -> None:
        """Called when an eager forward has ended, and not by an exception."""
        forward, now = self.session.forward, self.current
        if now is None:
            with self._counting:
                self.computed += forward is not None and self.session.engine.switched_on
            return
        for hook in self.root_hooks:
            hook.post_forward(model, None)
        branch = now.branch
        branch.under_way = False
        if now.plans and not now.skipped:
            branch.made = now.step
        branch.computed += not now.skipped
        if now.step.num_steps is not None and now.step.index == now.step.num_steps - 1:
            # Decoding comes next, and wants the memory.
            (now.first or LeadingBranch()).release(branch)
        with self._counting:
            self.computed += not now.skipped
            self.skipped += now.skipped

    def reset(self) -> None:
        """Count forwards from nothing."""
        with self._counting:
            self.computed = self.skipped = 0

    def _now(self) -> ForwardReuse:
        now = self.current
        assert now is not None
        return now

    def _why_not(
        self, forward: Forward, arguments: Mapping[str, Any], latents: list[torch.Tensor] | None
    ) -> str | None:
        if torch.is_grad_enabled():
            return "gradients may be asked for."
        if forward.step.index is None:
            return "the denoising step is unknown."
        if any("controlnet" in name and next(_tensors(value), None) is not None for name, value in arguments.items()):
            return "a control network adds to the latents between the blocks."
        if self.stage.needs_latents and latents is None:
            return "it needs to see the latents, and does not know where this model's are."
        return self.stage.not_at(forward.step)

    def _of_branch(self, forward: Forward, arguments: Mapping[str, Any], together: Together) -> ForwardReuse:
        step, recipe = forward.step, self.session.engine.recipe
        grid = None if forward.latents is None else forward.latents.grid
        shapes = _shapes(arguments.get("hidden_states"))
        branch = forward.run.reused((step.branch, grid, shapes), BranchReuse)
        conditions = _conditions(arguments)
        adjacent = branch.index is not None and step.index == branch.index + 1
        if branch.under_way or not adjacent or not _same(branch.conditions, conditions):
            # Of a forward that failed, of steps long ago, or of another prompt.
            branch.states.clear()
        branch.conditions, branch.index, branch.under_way = conditions, step.index, True
        step = forward.step = replace(step, computed=branch.computed)
        layers = len(self.session.engine.records)
        plans = not (recipe.select.is_dense or recipe.select.is_static)
        plans = plans and recipe.schedule.plans_now(step, branch.made, layers)
        first = leading = None
        if self.stage.shares_guidance:
            first = forward.run.reused(("leading", grid, shapes), LeadingBranch)
            leading = self._leading(first, branch, arguments)
        device = next((one.device for one in _tensors(arguments.get("hidden_states"))), torch.device("cpu"))
        # A process that found its state stale must not be alone with that.
        forced = together.any(plans or not branch.states, device)
        return ForwardReuse(branch, first, leading, step, forced, plans, together, device)

    def _leading(self, first: LeadingBranch, branch: BranchReuse, arguments: Mapping[str, Any]) -> BranchReuse | None:
        """The branch from which this one may take in its step; the first of a step becomes that."""
        latents = {"hidden_states": _versioned(arguments.get("hidden_states"))}
        if first.index != branch.index or first.branch is branch:
            if first.index is not None and not first.shared:
                self._note_batched()
            first.before, first.followers = first.followers, 0
            first.index, first.branch, first.latents = branch.index, branch, latents
            return None
        first.followers += 1
        first.shared = True
        # One that failed has left nothing, and one with other latents is no other guidance of the same.
        if first.branch is None or first.branch.under_way or not _same(first.latents, latents):
            return None
        return first.branch if latents["hidden_states"] else None

    def _note_batched(self) -> None:
        # A pipeline may say that guidance is off, in which case there is nothing to spare.
        if getattr(self.session.running_pipeline(), "do_classifier_free_guidance", True):
            self.session.engine.note(
                "reuse.guided spares nothing: each step is one forward, so that guidance is off, or its branches run "
                "as one batch."
            )


class RunStates(StateManager):
    """Gives diffusers' hooks the state of the run and branch whose forward this thread runs."""

    def __init__(self, manager: StateManager, tracker: ReuseTracker) -> None:
        make: Any = manager._state_cls
        self._make = lambda: make(*manager._init_args, **manager._init_kwargs)
        self._tracker = tracker

    @property
    def _context(self) -> CacheContext:  # type: ignore[override]
        step = self._tracker._now().step
        return CacheContext(step.branch or "", step.index, step.num_steps, sigma=step.sigma)

    @property
    def context(self) -> CacheContext:
        return self._context

    def get_state(self) -> Any:
        now = self._tracker._now()
        states = now.branch.states
        state = states.get(id(self))
        if state is None:
            state = states[id(self)] = self._make()
        if id(self) not in now.begun:
            now.begun.add(id(self))
            leading = None if now.leading is None else now.leading.states.get(id(self))
            self._tracker.stage.begin(state, now.step, leading)
            if now.forced:
                self._tracker.stage.force(state)
        return state

    def set_context(self, context: CacheContext | None) -> None:
        """What a pipeline says of a branch; the forward knows it already."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """A run that ends takes its states along."""


def _shapes(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.shape, given.dtype, given.device
    return tuple(map(_shapes, given)) if isinstance(given, (list, tuple)) else None


def _conditions(arguments: Mapping[str, Any]) -> Conditions:
    found = {}
    for name, value in arguments.items():
        if name.startswith(_CONDITIONS):
            found[name] = _versioned(value)
    return found


def _versioned(value: Any) -> list[tuple[torch.Tensor, int]]:
    return [(one, _version(one)) for one in _tensors(value)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _NESTS):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place; those of inference tensors are not counted."""
    return 0 if tensor.is_inference() else tensor._version


def _same(before: Conditions, now: Conditions) -> bool:
    """Whether two forwards were given the same; waits for the device where the tensors are not the very same."""
    if before.keys() != now.keys():
        return False
    for name, tensors in now.items():
        if len(before[name]) != len(tensors):
            return False
        for (old, old_version), (new, version) in zip(before[name], tensors, strict=True):
            # A tensor that was changed in place is no longer what the branch was given.
            if old_version != _version(old) or (old is not new and not _equal(old, new)):
                return False
            if old is new and old_version != version:
                return False
    return True


def _equal(old: torch.Tensor, new: torch.Tensor) -> bool:
    if old.shape != new.shape or old.device != new.device or old.dtype != new.dtype:
        return False
    same_memory = old.data_ptr() == new.data_ptr() and old.stride() == new.stride()
    return same_memory or bool(torch.equal(old, new))


def _latents(patch: PatchSize, tokens: LatentTokens | None, hidden: Any) -> list[torch.Tensor] | None:
    """What is denoised, (C, F, H, W) for each sample, in latents or tokens; None where that cannot be told.

    Families hold it as tokens (B, N, C), images (B, C, H, W), or clips with channels behind the batch, behind the
    frames, or last: the latent grid tells which.
    """
    if tokens is None or len(tokens.grid) != 3 or not isinstance(hidden, torch.Tensor):
        return None
    if hidden.dim() == 3:
        of_grid = hidden[:, tokens.start : tokens.start + prod(tokens.grid)]
        if of_grid.shape[1] < prod(tokens.grid):
            return None
        return list(of_grid.transpose(1, 2).unflatten(2, tokens.grid).unbind())
    if hidden.dim() == 4:
        hidden = hidden[:, :, None]
    for latents in (hidden, hidden.transpose(1, 2), hidden.movedim(-1, 1)) if hidden.dim() == 5 else ():
        sizes = zip(latents.shape[2:], patch, strict=True)
        if tuple(size // of_token for size, of_token in sizes) == tokens.grid:
            return list(latents.unbind())
    return None
