"""What workers log, on its way to the program's own logging.

Theory of operation: in a worker, a handler of the root logger sends each record to the pool, as one message on a socket
that nothing else uses.  It never waits: what does not fit into the socket any more is counted, and lost.  So a flood is
bounded, nothing can slow a task down, and a worker that dies has sent all that it could.  In the program the record is
handled by the logger of the same name, as if it had been logged there.

Rules: levels are those of the program's loggers when the worker was started, so that what nobody wants is not sent.

It runs in the workers too: stdlib and layer 0 only.
"""

from __future__ import annotations

import logging
import pickle
import socket
import sys

from ._status import LOGS_LOST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MOST_BYTES = 64 * 1024  # of a message
_BUFFER_SIZE = 1024 * 1024  # bytes that wait; the system may allow less
_MOST_TEXT = 16 * 1024  # characters of a text that is cut because the whole is too much
_ROOT = ""

# Whole messages, and an end.  Elsewhere than on Linux there is no such kind for sockets of one machine.
_KIND = socket.SOCK_SEQPACKET if sys.platform == "linux" else socket.SOCK_DGRAM


def open_sockets() -> tuple[socket.socket, socket.socket]:
    """Return both ends of what records travel through: the pool's, non-blocking, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, _KIND)
    ours.setblocking(False)
    theirs.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_SIZE)
    return ours, theirs


# --- the worker's side ---


class LogForwarder(logging.Handler):
    """Sends records to the pool."""

    def __init__(self, channel: socket.socket, page: memoryview) -> None:
        super().__init__()
        self._channel = channel
        self._page = page

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record, or count it as lost."""
        try:
            packed = pack_record(record)
        except Exception:
            self.handleError(record)
            return
        try:
            self._channel.send(packed)
        except OSError:  # no room, or the pool has gone
            self._page[LOGS_LOST] += 1


def forward_logs(channel: socket.socket, page: memoryview, levels: Mapping[str, int]) -> None:
    """Send what is logged from now on to the pool, in the place of whatever the program's own handlers would do here.

    Args:
        channel: the worker's end of the socket.
        page: the status page.
        levels: those of loggers, by their names; of the root logger, by an empty one; and as None what is disabled.
    """
    forwarder = LogForwarder(channel, page)
    root = logging.getLogger()
    loggers = [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    for logger in (root, *loggers):
        ends_here = logger is root or not logger.propagate
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        if ends_here:
            logger.addHandler(forwarder)
    for name, level in levels.items():
        logging.getLogger(name or None).setLevel(level)


def pack_record(record: logging.LogRecord) -> bytes:
    """Pickle a record: its message as text, or as the dictionary that structlog makes; what cannot be, as `repr`."""
    fields: dict[str, Any] = dict(record.__dict__)
    if record.args or not isinstance(record.msg, dict):
        fields["msg"] = record.getMessage()
    fields["args"] = None
    fields["processName"] = str(record.processName)  # that of a worker is more than it seems (see `WorkerProcess`)
    if record.exc_info:
        fields["exc_text"] = record.exc_text or logging.Formatter().formatException(record.exc_info)
        fields["exc_info"] = None
    try:
        packed = pickle.dumps(fields)
    except Exception:
        fields = {name: _as_sent(value) for name, value in fields.items()}
        packed = pickle.dumps(fields)
    if len(packed) > MOST_BYTES:
        packed = pickle.dumps({name: _shortened(value) for name, value in fields.items()})
    return packed


def _as_sent(value: object) -> object:
    try:
        pickle.dumps(value)
    except Exception:
        return repr(value)
    return value


def _shortened(value: object) -> object:
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        return f"{value[:_MOST_TEXT]}... ({len(value):,} characters)"
    if isinstance(value, int | float | str | None):
        return value
    return f"(a {type(value).__name__} that is too large)"


# --- the pool's side ---


def collect_levels() -> dict[str, int]:
    """Return the levels that this program has set, for `forward_logs`."""
    root = logging.getLogger()
    levels = {_ROOT: max(root.level, root.manager.disable + 1)}
    for name, logger in list(root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[name] = max(logger.level, root.manager.disable + 1)
    return levels


def handle_record(packed: bytes) -> None:
    """Handle a record as if it had been logged here."""
    record = logging.makeLogRecord(pickle.loads(packed))
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)
