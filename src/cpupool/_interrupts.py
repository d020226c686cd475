"""How a task in a worker is interrupted, and how an interrupt can only hit the task it is meant for.

It runs in the workers: stdlib and layer 0 only.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

from ._errors import TaskInterrupted
from ._status import (
    ASKED,
    BEFORE_FIRST,
    CONDEMNED,
    CONDEMNED_ITEM,
    CUT,
    EVERY_ITEM,
    HELD,
    INTERRUPT_SIGNAL,
    INTERRUPTED,
    NOT_BEGUN,
    SENT,
    STACK_HEADING,
    STACK_SIGNAL,
    STARTED,
    TOLD,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_MAX_FRAMES = 100  # of a stack that is written down
_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # the file name of its frames


class Interrupts:
    """Lets the pool's interrupt raise `TaskInterrupted` in the task it is meant for, and never anywhere else.

    Rules: the pool writes the condemned task's id into the page before it sends the signal; a task is armed before it
    looks at the page.  So whichever comes first, the signal or the task, one of the two sees the other.  A signal that
    comes when its task is not armed, be it late or early, does nothing: the page names another task, or none is armed.
    Of a batch, the pool may condemn one item; then it is that item which feels it, or nobody.

    Attributes:
        armed: the id of the task that may be interrupted now, 0 for none.  A task is interrupted once at most.
        hit: True if the task that was armed last has been interrupted.
        is_late: True if it is a batch that is to end after the item that runs.
        page: the cells of the status page.
    """

    __slots__ = ("_stacks", "armed", "hit", "is_late", "page")

    def __init__(self, page: memoryview, stacks: int) -> None:
        """Args: stacks are appended to the file `stacks`."""
        self.page = page
        self._stacks = stacks
        self.armed = 0
        self.hit = False
        self.is_late = False

    def arm(self, task_id: int) -> None:
        """Let `task_id` be interrupted from now on; raises at once if it is condemned already."""
        self.hit = False
        self.is_late = False
        self.armed = task_id
        self.page[STARTED] = task_id
        self.raise_if_condemned()

    def raise_if_condemned(self, _number: int = 0, frame: FrameType | None = None) -> None:
        """Handle the signal: raise in the task that is armed, if it is the one, and where it can be raised.

        Else it waits for the pool's next signal.  If the pool asks where the task is, write that down.
        """
        if self.armed and self.page[CUT] == self.armed:
            self.page[CUT] = 0  # seen
            self.is_late = True
        if frame is not None and (asked := self.page[ASKED]) != self.page[TOLD]:
            self._write_stack(frame)
            self.page[TOLD] = asked
        if self.armed and self._is_condemned() and not _must_not_raise_in(frame):
            self.page[INTERRUPTED] = self.armed
            self.armed = 0
            self.hit = True
            self._write_stack(frame)
            raise TaskInterrupted

    def _is_condemned(self) -> bool:
        page = self.page
        if page[CONDEMNED] != self.armed:
            return False
        item = BEFORE_FIRST if page[SENT] == NOT_BEGUN else page[SENT] + page[HELD]
        return page[CONDEMNED_ITEM] in (EVERY_ITEM, item)

    def _write_stack(self, frame: FrameType | None) -> None:
        """Write down where the task is, as `faulthandler` would."""
        with contextlib.suppress(Exception):  # the task may be at the end of its memory, or of the files it may write
            lines = [STACK_HEADING]
            while frame is not None and len(lines) <= _MAX_FRAMES:
                lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
                frame = frame.f_back
            os.write(self._stacks, "\n".join((*lines, "")).encode("utf-8", "backslashreplace"))


def _must_not_raise_in(frame: FrameType | None) -> bool:
    """Return True in a `__del__`, where Python ignores what is raised, and in an import.

    A broken-off import spoils the worker for good: modules that the broken one had imported stay in `sys.modules`, but
    the next try does not bind them in it (`NameError` and `AttributeError` out of nowhere).
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False


def await_interrupts(interrupts: Interrupts, stacks: int) -> None:
    """Handle the signals.

    `faulthandler` answers at once, whatever the task does, also where Python's own handler has to wait.  But it may
    come when a frame is only half made, and crash; so it is asked only if nothing has been heard for a while.
    """
    signal.signal(INTERRUPT_SIGNAL, interrupts.raise_if_condemned)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=False)
