"""Progress bars for `pool.map(..., on_progress=...)`, by rich or by tqdm, whichever is installed and liked.

Use them as `with progress.rich_bar("resizing") as on_progress: await pool.map(fn, items, on_progress=on_progress)`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextlib.contextmanager
def rich_bar(description: str = "", *, progress: Any = None) -> Iterator[Callable[[int, int | None], object]]:
    """Show a progress bar of rich's; the context is the `on_progress` for one `map`.

    Args:
        description: what stands in front of it.
        progress: a `rich.progress.Progress` that is being shown, to add this bar to; by default one of its own, on
            standard error.

    Raises:
        ImportError: rich is not installed; it comes with `cpupool[cli]`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with contextlib.ExitStack() as stack:
        if progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        bar = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


@contextlib.contextmanager
def tqdm_bar(description: str = "", **arguments: Any) -> Iterator[Callable[[int, int | None], object]]:
    """Show a progress bar of tqdm's, in a terminal or a notebook; the context is the `on_progress` for one `map`.

    Args:
        description: what stands in front of it.
        **arguments: any of `tqdm.tqdm`'s, like `file` or `unit`.

    Raises:
        ImportError: tqdm is not installed; it comes with `cpupool[tqdm]`.
    """
    from tqdm.auto import tqdm

    with tqdm(desc=description, **arguments) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
