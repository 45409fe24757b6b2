"""One progress bar for every stage: what is being done, how much, items a second and the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

console = Console(stderr=True)


class _RateColumn(TextColumn):
    """Items a second since the bar started, not counting what was there before."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        made = task.completed - task.fields.get("before", 0)
        return Text(f"{made / task.elapsed:,.0f}/s" if task.elapsed and made else "-/s", style="dim")


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields the function that advances it by a number of items."""
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total, completed=done, before=done)
        yield lambda count: bar.update(task, advance=count)
