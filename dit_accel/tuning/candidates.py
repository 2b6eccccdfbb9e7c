"""What is searched: dense phase, density, and the list of computed steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..recipe import Recipe
from ..stages.reuse.listed import Listed
from .lists import Trajectory, best_lists
from .time_model import SEARCH, kinds_of

DENSITIES = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
DENSE_FRACTIONS = (0.0, 0.034, 0.067, 0.1, 0.134, 0.2)
MEASURED_DENSITIES = (0.15, 0.3, 0.5)
USUAL_DENSITY, USUAL_FRACTION = 0.3, 0.1
MEASURED_FRACTIONS = (0.0, 0.2)
MEASURED_SHARES = (0.25, 0.4, 0.6)
"""Shares of the steps that the measured lists compute."""

MOST_PARTS = len(MEASURED_SHARES) + len(MEASURED_DENSITIES) + len(MEASURED_FRACTIONS)
"""Combinations that are run to fit the model, at most."""


@dataclass(frozen=True)
class Choice:
    """One combination.

    Attributes:
        density: of sparse attention; None for dense attention.
        dense_steps: at the start, the search of a plan with them; 0 without sparse attention.
        computed: steps that run all blocks; None for all.
    """

    density: float | None = None
    dense_steps: int = 0
    computed: tuple[int, ...] | None = None

    def recipe(self, base: Recipe, num_steps: int) -> Recipe:
        """The recipe for a run of this many steps."""
        chosen = Recipe()
        if self.density is not None:
            fraction = self.dense_steps / num_steps
            # The dense phase is chosen here, of few steps too.
            phase = {"schedule.dense_fraction": fraction, "schedule.few_steps": 0}
            chosen = base.with_fields({"select.density": self.density, **phase})
        if self.computed is None:
            return chosen
        return chosen.with_fields(
            {"reuse": "listed", "reuse.computed": self.computed, "reuse.num_steps": num_steps, "reuse.order": 1}
        )

    @classmethod
    def of(cls, recipe: Recipe, num_steps: int) -> Choice:
        """The inverse of :meth:`recipe`."""
        sparse = not recipe.select.is_dense
        return cls(
            recipe.select.density if sparse else None,
            round(recipe.schedule.dense_fraction * num_steps) if sparse else 0,
            recipe.reuse.computed if isinstance(recipe.reuse, Listed) else None,
        )

    def spelled(self, num_steps: int) -> str:
        """In words, for a table."""
        steps = f"{num_steps if self.computed is None else len(self.computed)} of {num_steps} steps"
        if self.density is None:
            return f"{steps}, dense attention"
        return f"{steps}, density {self.density:g}, {self.dense_steps} dense"


def refuse_base(recipe: Recipe) -> None:
    """Refuse a recipe whose density cannot be searched for.

    Raises:
        ValueError: says why.
    """
    if recipe.select.is_dense or not recipe.select.has_density:
        raise ValueError(f"tune needs a recipe with a density to choose, got {type(recipe.select).__name__}.")
    if recipe.select.head_densities or recipe.schedule.density_points:
        raise ValueError("tune chooses one density, and this recipe has one for each head or point of the trajectory.")
    if not recipe.reuse.is_none:
        raise ValueError(f"tune chooses the steps to compute, and this recipe has {type(recipe.reuse).__name__}.")


def dense_steps_of(fraction: float, num_steps: int) -> int:
    """At least one: the first step of a run decides most, and a plan needs queries and keys to be made of."""
    return max(1, round(fraction * num_steps))


class Space:
    """All combinations for a model and a number of steps.

    Args:
        base: recipe whose density and dense phase are chosen.
        trajectory: of the prompts' dense runs.
    """

    def __init__(self, base: Recipe, trajectory: Trajectory) -> None:
        self.base, self.trajectory = base, trajectory
        self.num_steps = trajectory.num_steps
        self.lists = best_lists(trajectory)
        # A gap has an end: few steps may need more lists than there are.
        self.lists.pop(self.num_steps, None)

    def recipe(self, choice: Choice) -> Recipe:
        return choice.recipe(self.base, self.num_steps)

    def measured(self) -> list[Choice]:
        """Those that are run to fit the model, the plainest first: a few lists alone, then some sparsity alone."""
        usual = dense_steps_of(USUAL_FRACTION, self.num_steps)
        sparse = [Choice(density, usual) for density in MEASURED_DENSITIES]
        sparse += [Choice(USUAL_DENSITY, dense_steps_of(one, self.num_steps)) for one in MEASURED_FRACTIONS]
        lists = [Choice(computed=self.lists[count]) for count in self._measured_counts()]
        return list(dict.fromkeys([*lists, *sparse]))

    def all(self) -> list[Choice]:
        """Every combination, within what is measured."""
        fewest = min(self._measured_counts(), default=self.num_steps)
        phases = sorted({dense_steps_of(fraction, self.num_steps) for fraction in DENSE_FRACTIONS})
        found = [Choice(computed=steps) for steps in _from(self.lists, fewest)]
        for dense_steps in phases:
            lists: list[tuple[int, ...] | None] = [None, *_from(self._lists_behind(dense_steps), fewest)]
            found += [Choice(density, dense_steps, steps) for density in DENSITIES for steps in lists]
        return list(dict.fromkeys([*self.measured(), *found]))

    def score(self, choice: Choice) -> float:
        """Of the choice's list; 0 where all steps are computed."""
        return 0.0 if choice.computed is None else self.trajectory.score(choice.computed)

    def _measured_counts(self) -> list[int]:
        counts = sorted(self.lists)
        wanted = (max(share * self.num_steps, 2.0) for share in MEASURED_SHARES)
        return sorted({min(counts, key=lambda count: (abs(count - share), count)) for share in wanted if counts})

    def _lists_behind(self, dense_steps: int) -> Mapping[int, tuple[int, ...]]:
        """Lists with the step that searches, which is always computed."""
        kinds = kinds_of(self.recipe(Choice(USUAL_DENSITY, dense_steps)), self.num_steps)
        searches = [step for step, kind in enumerate(kinds) if kind == SEARCH]
        lists = best_lists(self.trajectory, searches)
        lists.pop(self.num_steps, None)
        return lists


def _from(lists: Mapping[int, tuple[int, ...]], fewest: int) -> Sequence[tuple[int, ...]]:
    return [steps for count, steps in sorted(lists.items()) if count >= fewest]
