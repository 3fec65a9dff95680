"""A server in front of the reference server, which misses some of its paths, as an older RVM-Server does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

from rvmcv_worker.reference.server import ReferenceServer


@contextlib.contextmanager
def front(
    server: ReferenceServer,
    look: Callable[[str, bytes], bool],
    *,
    refuses: Callable[[str, bytes], bool] = lambda _path, _body: False,
) -> Iterator[str]:
    """A front before the server, which answers 404 where `look` says no to path and body; its URL.

    Where it `refuses` them it answers 422.
    """

    class Front(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not look(self.path.split("?")[0], body):
                status, content = 404, b"<html>not found</html>"
            elif refuses(self.path.split("?")[0], body):
                status, content = 422, b'{"message": "not as this server knows it"}'
            else:
                headers = {name: self.headers[name] for name in ("Authorization", "Accept", "Content-Type")}
                answer = requests.request(
                    self.command, server.url + self.path, data=body, headers=headers, timeout=60
                )
                status, content = answer.status_code, answer.content
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
