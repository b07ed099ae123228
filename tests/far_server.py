"""A server in a process of its own: S3's protocol (moto), or plain HTTP with ranges on a folder. It counts requests and
bytes, waits before each answer, and refuses some, as it is told under /__told.

    python far_server.py s3 | http FOLDER | bare FOLDER     (bare: lists no folders)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs, unquote

from werkzeug.serving import make_server
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response


class Server:
    """A process that serves; `url` is what it is reached by."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def told(self, **asked: Any) -> Any:
        """Requests and bytes since it was last asked."""
        query = "&".join(f"{key}={value}" for key, value in asked.items())
        with urllib.request.urlopen(f"{self.url}/__told?{query}") as answer:
            return json.load(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()  # type: ignore[union-attr]


class Counted:
    """An application behind a counter."""

    def __init__(self, app: Any) -> None:
        self.app, self.lock = app, threading.Lock()
        self.requests: list[str] = []
        self.bytes = self.refuse = self.now = self.most = 0
        self.latency = 0.0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/__told":
            return self._told(environ, start)
        with self.lock:
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}")
            self.refuse -= (refused := self.refuse > 0)
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.latency)
        body = b"".join((Response("too much", 503) if refused else self.app)(environ, start))
        with self.lock:
            self.now -= 1
            self.bytes += len(body)
        return [body]

    def _told(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        """What was counted since it was last asked for; takes latency= and refuse=."""
        asked = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}
        self.latency = float(asked.get("latency", self.latency))
        self.refuse = int(asked.get("refuse", self.refuse))
        told = {"requests": self.requests, "bytes": self.bytes, "most": self.most}
        self.requests, self.bytes, self.most = [], 0, 0
        return Response(json.dumps(told))(environ, start)


def folder(root: str, lists: bool) -> Any:
    """A folder over HTTP, with ranges."""

    @Request.application
    def app(request: Request) -> Response:
        path = os.path.join(root, unquote(request.path).lstrip("/"))
        if os.path.isfile(path):
            return send_file(path, request.environ, "application/octet-stream", conditional=True)
        if not lists or not os.path.isdir(path):
            return Response("", 403 if os.path.isdir(path) else 404)
        names = sorted(name + "/" * os.path.isdir(os.path.join(path, name)) for name in os.listdir(path))
        return Response("".join(f'<a href="{name}">{name}</a>\n' for name in ["../", *names]), mimetype="text/html")

    return app


def main(kind: str, root: str = "") -> None:
    if kind == "s3":
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        app = DomainDispatcherApplication(create_backend_app)
    else:
        app = folder(root, lists=kind == "http")
    server = make_server("127.0.0.1", 0, Counted(app), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
