"""CUDA graphs for the blocks of a patched pipeline, which can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ...frozen_planner import FrozenPlanner
from ...planner import Planner, why_not_of_one_call
from ..handle import PatchHandle
from ..hook import Hook
from ..session import Session
from ..targets import attending_blocks, root_hook, transformers_of
from .blocks import BlockGraphs, CapturedBlock


def install_graphs(handle: PatchHandle) -> Callable[[], None]:
    """Let the blocks of a patched pipeline be captured and replayed, compiled or not: compile them before.

    Returns:
        The undo.
    """
    undo: list[Callable[[], None]] = []
    together: list[BlockGraphs] = []
    for _, model, _ in transformers_of(handle.target):
        hook = root_hook(model)
        if hook is None:
            continue
        session = hook.session
        why = why_never(session.engine.planner)
        if why is not None:
            session.engine.note(f"Blocks run without CUDA graphs: {why}.", lasting=True)
            continue
        undo += _install(session, model, together)

    def undo_all() -> None:
        while undo:
            undo.pop()()

    return undo_all


REPLACED = "others stand where they were to be captured, as after a later torch.compile"


class EndGraphs(Hook):
    """Forward hook of a transformer."""

    def __init__(self, graphs: BlockGraphs, blocks: list[CapturedBlock]) -> None:
        self.graphs = graphs
        self.blocks = blocks

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.graphs.end()
        if not all(block.is_in_place for block in self.blocks):
            self.graphs.session.engine.note(f"Blocks run without CUDA graphs: {REPLACED}.")


def why_never(planner: Planner) -> str | None:
    """Why no block would do the same at two steps under a planner's recipe; None where it would."""
    recipe = planner.recipe
    if recipe.select.is_dense:
        return "this recipe leaves all attention to the model"
    if recipe.compensate.follows_step:
        return f"{type(recipe.compensate).__name__} depends on the step"
    if recipe.select.is_static or isinstance(planner, FrozenPlanner):
        return None
    if recipe.schedule.drift_bound is not None:
        return "this recipe looks at every step whether its plans still hold"
    return None if recipe.schedule.keeps_plans else why_not_of_one_call(recipe)


def _install(session: Session, model: nn.Module, together: list[BlockGraphs]) -> list[Callable[[], None]]:
    graphs = BlockGraphs(session)
    graphs.together = together
    together.append(graphs)
    undo: list[Callable[[], None]] = [graphs.close]
    blocks: list[CapturedBlock] = []
    paths = {module: path for path, module in model.named_modules()}
    names = [record.name for record in session.engine.records]
    for index, block in enumerate(attending_blocks(model, session.family)):
        path = paths[block]
        layers = tuple(n for n, name in enumerate(names) if name.startswith(f"{path}."))
        before = block._compiled_call_impl
        captured = CapturedBlock(graphs, block, before or block._call_impl, index, layers)
        block._compiled_call_impl = captured
        blocks.append(captured)
        undo.append(partial(_give_back, block, captured, before))
    # Before the hook by which the session forgets the forward.
    undo.append(model.register_forward_hook(EndGraphs(graphs, blocks), prepend=True).remove)
    return undo


def _give_back(block: nn.Module, captured: CapturedBlock, before: object) -> None:
    if block._compiled_call_impl is captured:
        block._compiled_call_impl = before  # type: ignore[assignment]
