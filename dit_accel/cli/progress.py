"""The bar that long commands show on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import plain_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..calibration.progress import Progress


def progress_bar(title: str, quiet: bool) -> Any:
    """Progress with the time left, on stderr; entering it gives the function to tell."""
    from contextlib import contextmanager, nullcontext

    if quiet:
        return nullcontext(lambda _state: None)

    @contextmanager
    def bar() -> Iterator[Callable[[Progress], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Bar(*columns, console=plain_console(stderr=True)) as shown:
            task = shown.add_task(title, total=None, left="")

            def tell(state: Progress) -> None:
                left = "" if state.seconds_left is None else f"{state.seconds_left:.0f} s left"
                shown.update(task, description=state.stage, completed=state.done, total=state.total, left=left)

            yield tell

    return bar()
