"""Keeping the pool's fork server: started when workers are wanted, stopped when its imports take too long.

Rules: all in the supervisor's thread, which never waits for the server's imports; the crew says when there is news.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._crew import Crew
    from ._fork_server import ForkServer
    from ._starting import WorkerStarter


class ServerKeeper:
    """Has the fork server ready when workers are to be started, if the starter needs one.

    Attributes:
        deadline: when the server that is starting is overdue; infinite if none is.
    """

    def __init__(
        self, starter: WorkerStarter, crew: Crew, start_timeout: float, on_failure: Callable[[Exception], object]
    ) -> None:
        self.deadline = math.inf
        self._starter = starter
        self._crew = crew
        self._start_timeout = start_timeout
        self._on_failure = on_failure

    @property
    def is_starting(self) -> bool:
        server = self._starter.server
        return server is not None and server.answer is not None

    def is_ready(self) -> bool:
        """Return True if workers can be started; else start the server that they need, unless it is starting."""
        server = self._starter.server
        if server is None or server.is_ready:
            return True
        if not self.is_starting:
            answer = self._starter.start_server(server)
            self.deadline = time.monotonic() + self._start_timeout
            self._crew.watch_descriptor(answer, lambda: self._hear(server, answer))
        return False

    def _hear(self, server: ForkServer, answer: int) -> None:
        try:
            server.read_answer()
        except Exception as error:
            self._crew.unwatch_descriptor(answer)
            self.deadline = math.inf
            server.stop()
            self._on_failure(error)
        else:
            if server.is_ready:
                self._crew.unwatch_descriptor(answer)
                self.deadline = math.inf

    def stop_overdue(self, now: float) -> None:
        """Stop the server if its imports take too long."""
        if now >= self.deadline:
            self.close()
            self._on_failure(
                TimeoutError(f"the imports to preload took longer than start_timeout ({self._start_timeout:g} s)")
            )

    def close(self) -> None:
        """Stop the server; it is started again when it is needed again."""
        self.deadline = math.inf
        server = self._starter.server
        if server is not None and server.answer is not None:
            self._crew.unwatch_descriptor(server.answer)
        self._starter.close()
