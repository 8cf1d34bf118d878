"""JSON lines over a socket between a hooked child and its parent."""

from __future__ import annotations

import json
import select
import socket
import time
from typing import Any

#: Environment variable with the descriptor of the child's end.
VARIABLE = "UPSHIFT_CHANNEL"

#: A longer message is not one of ours.
MAX_MESSAGE = 64 * 2**20


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end. Messages are JSON objects, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. Raises ChannelClosed."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self, timeout: float | None = None) -> dict[str, Any] | None:
        """The next message; None after `timeout` seconds. Raises ChannelClosed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (end := self._buffer.find(b"\n")) < 0:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if left is not None and not select.select([self._socket], [], [], left)[0]:
                return None
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise ChannelClosed(str(error)) from None
            if not data or len(self._buffer) > MAX_MESSAGE:
                raise ChannelClosed("the other process ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = json.loads(line)
        return message if isinstance(message, dict) else {"kind": "unknown"}

    def close(self) -> None:
        """Close this end."""
        self._socket.close()
