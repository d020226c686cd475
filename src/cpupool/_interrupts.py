"""How a task in a worker is interrupted, and how an interrupt can only hit the task it is meant for.

It runs in the workers: stdlib and layer 0 only.
"""

from __future__ import annotations

import faulthandler
import signal

from ._errors import TaskInterrupted
from ._status import (
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
    STARTED,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

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
    """

    __slots__ = ("armed", "hit", "is_late", "page")

    def __init__(self, page: memoryview) -> None:
        self.page = page
        self.armed = 0
        self.hit = False
        self.is_late = False

    def arm(self, task_id: int) -> None:
        """Let `task_id` be interrupted from now on; raises at once if it is condemned already."""
        self.hit = False
        self.is_late = False
        self.armed = task_id
        self.page[STARTED] = task_id
        if self.page[CONDEMNED] == task_id:
            self.raise_if_condemned()

    def raise_if_condemned(self, _number: int = 0, frame: FrameType | None = None) -> None:
        """Handle the signal: raise in the task that is armed, if it is the one, and where it can be raised.

        Else it waits for the pool's next signal.
        """
        if self.armed and self.page[CUT] == self.armed:
            self.page[CUT] = 0  # seen
            self.is_late = True
        if self.armed and self._is_condemned() and not _must_not_raise_in(frame):
            self.page[INTERRUPTED] = self.armed
            self.armed = 0
            self.hit = True
            raise TaskInterrupted

    def _is_condemned(self) -> bool:
        page = self.page
        if page[CONDEMNED] != self.armed:
            return False
        item = BEFORE_FIRST if page[SENT] == NOT_BEGUN else page[SENT] + page[HELD]
        return page[CONDEMNED_ITEM] in (EVERY_ITEM, item)


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


def await_interrupts(interrupts: Interrupts, status: int) -> None:
    """Handle the interrupt signal: first `faulthandler` writes the stack, then Python runs the handler."""
    signal.signal(INTERRUPT_SIGNAL, interrupts.raise_if_condemned)
    faulthandler.register(INTERRUPT_SIGNAL, status, all_threads=False, chain=True)
