"""A server that sends bytes as they are: for replies that http.server would not send.

    with Raw(lambda request: [head, body]) as raw:
        client = RolloutsClient("m", base_url=raw.url)
"""

import contextlib
import json
import socket
import struct
import threading
from typing import Any, Callable, Dict, List, Sequence

RESET = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds: closing resets


class Raw:
    """Answer each request with the pieces that *script* makes of it, and close the connection.

    A script takes (headers, body) and returns the pieces. With *reset*, the body is left unread, so
    that the end of the connection is a reset, as of a server that refuses before it has read.
    """

    def __init__(
        self, script: Callable[[Dict[str, str], Dict[str, Any]], Sequence[bytes]], *, reset: bool = False
    ) -> None:
        self.script, self.reset = script, reset
        self.bodies: List[Dict[str, Any]] = []
        self.came = 0
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self.thread = threading.Thread(target=self.serve, daemon=True)

    def __enter__(self) -> "Raw":
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(10)

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        self.came += 1
        with connection, contextlib.suppress(OSError), connection.makefile("rb") as file:
            headers = {}
            file.readline()
            while True:
                line = file.readline().decode("latin-1").strip()
                if not line:
                    break
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = {}
            if not self.reset:
                body = json.loads(file.read(int(headers.get("content-length") or 0)) or b"{}")
                self.bodies.append(body)
            for piece in self.script(headers, body):
                connection.sendall(piece)
            if self.reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
