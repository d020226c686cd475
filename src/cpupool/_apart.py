"""Work that takes longer than an event loop may stand still: in a thread of its own, apart from it.

Theory of operation: pickling holds the GIL, in whatever thread.  It lets others have it where Python code runs: in the
`write` and the `read` of the file that a pickler writes and an unpickler reads, some 64 kB at a time (`pause`).  While
objects are rebuilt by the hundred thousand, the garbage collector would look at all of them again and again, for 50 ms
and more at a time; so it is off meanwhile, and then they count as old.

The threads exist only while there is such work.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from ._forking import at_fork
from ._parcels import GivenUp
from ._waiting import BlockingWaits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ._waiting import ChannelWaits, Ticket

T = TypeVar("T")

_MOST_THREADS = 4

pause = functools.partial(time.sleep, 0)  # lets another thread have the GIL


def pause_while(is_wanted: Callable[[], bool]) -> Callable[[], None]:
    """Return a `pause` that raises `GivenUp` once nobody wants what is done any more."""

    def pause_or_stop() -> None:
        if not is_wanted():
            raise GivenUp
        pause()

    return pause_or_stop


async def run_apart(job: Callable[[Callable[[], bool]], T], waits: ChannelWaits, *, in_own_thread: bool = False) -> T:
    """Run `job(is_wanted)` in another thread, if this one runs an event loop, and return what it returns.

    Args:
        job: what is to be done.
        waits: the caller's.
        in_own_thread: True for what may wait for others: it keeps no other work from being done, nor Ctrl-C from
            ending the wait.

    Raises:
        Exception: what the job raises.

    Cancellation: the caller returns at once; `is_wanted()` is False from then on.
    """
    if isinstance(waits, BlockingWaits) and not in_own_thread:
        return job(lambda: True)
    ticket = waits.ticket()
    if not (_start(_make_thread(_do, job, ticket)) if in_own_thread else _begin(job, ticket)):
        return job(lambda: True)
    try:
        await waits.settled(ticket)
    except BaseException:
        ticket.withdraw()
        raise
    result: T = ticket.result()
    return result


def _begin(job: Callable[[Callable[[], bool]], object], ticket: Ticket) -> bool:
    """Give a thread the job; False if there can be none."""
    with _lock:
        _jobs.append((job, ticket))
        _threads.intersection_update([each for each in _threads if each.is_alive()])  # one may never have begun
        if len(_threads) >= min(_MOST_THREADS, max(os.cpu_count() or 1, 2)):
            return True
        thread = _make_thread(_work)
        _threads.add(thread)
    if _start(thread):
        return True
    with _lock:
        _threads.discard(thread)
        if (job, ticket) not in _jobs:
            return True  # another thread has taken it
        _jobs.remove((job, ticket))
        return False


def _make_thread(function: Callable[..., object], *args: object) -> threading.Thread:
    return threading.Thread(target=function, args=args, name="cpupool-apart", daemon=True)


def _start(thread: threading.Thread) -> bool:
    try:
        thread.start()
    except RuntimeError:  # no more threads, or the program is ending
        return False
    return True


def _work() -> None:
    while True:
        with _lock:
            if not _jobs:
                _threads.discard(threading.current_thread())
                return
            job, ticket = _jobs.popleft()
        if ticket.is_open:
            _do(job, ticket)
        del job, ticket


def _do(job: Callable[[Callable[[], bool]], Any], ticket: Ticket) -> None:
    try:
        value = job(lambda: ticket.is_open)
    except BaseException as error:
        ticket.settle(error=error)
    else:
        ticket.settle(value)


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keep the garbage collector off in the block, and let what is made in it count as old afterwards.

    Not in the main thread, where a signal handler may raise at any time, and it might stay off for ever.
    """
    global _without_collector, _turns_on  # noqa: PLW0603  # it is the process's
    if threading.current_thread() is threading.main_thread():
        yield
        return
    if gc.isenabled():
        gc.collect(1)  # the young garbage must not grow old below
    with _lock:
        if not _without_collector:
            _turns_on = gc.isenabled()
            gc.disable()
        _without_collector += 1
    try:
        yield
    finally:
        with _lock:
            _without_collector -= 1
            if not _without_collector and _turns_on:
                if not gc.get_freeze_count():  # else the program has frozen something itself, and it would thaw
                    gc.freeze()
                    gc.unfreeze()  # into the oldest generation, without looking at a single object
                gc.enable()


_lock = threading.Lock()
_jobs: deque[tuple[Callable[[Callable[[], bool]], Any], Ticket]] = deque()
_threads: set[threading.Thread] = set()
_without_collector = 0
_turns_on = False


def _begin_anew() -> None:
    global _lock, _without_collector  # noqa: PLW0603
    _lock = threading.Lock()
    _jobs.clear()
    _threads.clear()
    if _without_collector and _turns_on:
        gc.enable()
    _without_collector = 0


at_fork(after_in_child=_begin_anew)
