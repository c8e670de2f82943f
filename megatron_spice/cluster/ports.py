"""Loopback ports that stay ours.

Asking the kernel for a free port, closing the socket and handing the number to a child leaves a gap in which anybody
may take it. Here the socket stays bound, without listening and with SO_REUSEADDR: Linux then lets the child bind and
listen on the same number (servers set SO_REUSEADDR too), but gives that number to nobody who asks for "any port" and to
no outgoing connection. The reservation is simply kept as long as the child lives.
"""

from __future__ import annotations

import contextlib
import socket
from types import TracebackType

LOOPBACK = "127.0.0.1"


class ReservedPort:
    """A TCP port on the loopback interface that is reserved until `release`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((LOOPBACK, 0))
        self.number: int = self._socket.getsockname()[1]

    def release(self) -> None:
        """Gives the port up; may be called twice."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
