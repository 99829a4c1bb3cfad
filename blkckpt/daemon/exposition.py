"""Metrics over HTTP: ``GET /metrics`` on a unix socket (0600), and if wanted on a port of 127.0.0.1.

The text is OpenMetrics for who asks for it (Prometheus does), else Prometheus' older format.  One request at a time
on each listener, with a deadline: a peer that says nothing holds up the next one for :data:`PEER_SECONDS`, and costs
neither a thread nor memory.  On the socket the kernel's word for the peer's uid must be ours (or root's); on the port
everybody on this machine can read the figures, which say nothing of a guest's data.
"""

from __future__ import annotations

import os
import socket
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterable
from typing import Any

import prometheus_client
from prometheus_client import registry

from blkckpt import errors, log
from blkckpt.control import server

PEER_SECONDS = 5.0
PATH = "/metrics"
LOOPBACK = "127.0.0.1"

logger = log.get(__name__)


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    timeout = PEER_SECONDS

    def address_string(self) -> str:
        """No name service is asked; a unix socket's peer has no address."""
        return "local"

    def get_environ(self) -> dict[str, Any]:
        if not self.client_address:
            self.client_address = ("", 0)
        return super().get_environ()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name in the base class)
        logger.debug("metrics: %s", format % args)


class _Server(wsgiref.simple_server.WSGIServer):
    """On a socket that listens already."""

    def __init__(self, listener: socket.socket, application: Callable[..., Any]) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        listener.settimeout(PEER_SECONDS)  # a connection that was there and is gone again
        self.server_name, self.server_port = "blkckpt", 0
        self.setup_environ()
        self.set_app(application)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if request.family != socket.AF_UNIX:
            return True
        _, uid = server.peer_of(request)
        return uid in (os.geteuid(), 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("a scrape failed", exc_info=True)


def _application(metrics: registry.CollectorRegistry) -> Callable[..., Iterable[bytes]]:
    answer = prometheus_client.make_wsgi_app(metrics)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH or environ["REQUEST_METHOD"] != "GET":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [f"there is only GET {PATH}\n".encode()]
        found: Iterable[bytes] = answer(environ, start_response)
        return found

    return application


def loopback(port: int) -> socket.socket:
    """A listening socket on 127.0.0.1; 0 is any port."""
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise errors.from_os_error(error, f"listening on {LOOPBACK}:{port} for metrics") from error


class Exposition:
    """Serves *metrics* on *listener*, which it owns, in a thread of its own."""

    def __init__(self, listener: socket.socket, metrics: registry.CollectorRegistry) -> None:
        self._server = _Server(listener, _application(metrics))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.5,), name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Answer what is being answered, and stop."""
        if self._thread.ident is not None:
            self._server.shutdown()
            self._thread.join(PEER_SECONDS)
        self._server.server_close()
