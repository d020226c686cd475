"""The status page: what pool and worker tell each other without a message, while a task runs and after a death.

It is one file of memory that both sides hold; its cells are numbered below.  The worker writes which task it last
picked up, so that the pool knows, whatever happened, whether a lost call had begun; which it last started, when its
call was here as a whole; which it has last interrupted; and which it last finished.  It also writes how far it has come
in its life, and, where there is a limit, how much memory it held after its last task.  The pool writes which task it
has condemned, and then sends the interrupt signal.

A batch is one task with many items.  For it the worker also writes how many results it has sent, and how many it holds
in its journal (see `_journal`), behind the page; together that is the number of the item that runs.  If items have a
time limit, it writes when that one began.  The pool writes which item it has condemned, and which batch is to end after
the item that runs.

Behind that stands what the running task has last reported (see `_reports`), and its number in the page.

Behind that stands the end of what the worker has written to standard error (see `_last_words`).

Behind that Python stacks are appended: by the interrupted task, by one that the pool asks where it is, and by
`faulthandler` at a crash, and when the pool asks because its signal is not felt.

It runs in the workers too: stdlib only.
"""

from __future__ import annotations

import mmap
import signal

STATUS_PAGE_SIZE = mmap.PAGESIZE

# The cells, each a native unsigned 64-bit number.  The first five hold task ids.
PICKED_UP, STARTED, CONDEMNED, INTERRUPTED, FINISHED, STAGE, RESIDENT = range(7)
CONDEMNED_ITEM, SENT, HELD, COLUMN, VOID, SINCE, CUT = range(7, 14)  # of a batch; SINCE in monotonic nanoseconds
REPORTED, REPORTING = range(14, 16)  # see `_reports`
ASKED, TOLD = range(16, 18)  # numbers of stacks: the last one that the pool wants, and the last one that was written
SAID, SAID_BEFORE = range(18, 20)  # bytes written to standard error, see `_last_words`; before the running task
LOGS_LOST = 20  # records, see `_logs`
CELL_SIZE = 8
BEFORE_FIRST = 2**64 - 2  # in CONDEMNED_ITEM: while the items are being unpickled
EVERY_ITEM = NOT_BEGUN = NOT_NOW = 2**64 - 1  # in CONDEMNED_ITEM; in SENT until the items are there; in SINCE

# What STAGE holds: how far a worker has come.
STAGE_SETTLING, STAGE_INITIALIZING, STAGE_READY = range(3)

# Who does not expect it ignores it, no C library uses it, and many of them are one; real-time signals queue up.  Go
# preempts with it for the same reasons.
INTERRUPT_SIGNAL = signal.SIGURG

# Asks for the stack of a task that does not feel an interrupt: a real-time signal that no C library reserves, so that
# SIGUSR1 and SIGUSR2 stay the users', where there are such signals.
STACK_SIGNAL: int = signal.SIGRTMIN + 6 if hasattr(signal, "SIGRTMIN") else signal.SIGUSR2

# Signals that end a process and that others send; the rest are crashes.
SENT_BY_OTHERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)

UNKNOWN_STATUS = 256  # as an exit status: it could not be learnt; no process can exit with it

# What is written begins with the second, by faulthandler at a crash with the first.
CRASH_HEADING, STACK_HEADING = "Fatal Python error: ", "Stack (most recent call first):"
