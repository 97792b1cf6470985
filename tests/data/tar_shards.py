"""Small tar shards for tests, written with Python's tarfile, and an HTTP server for them."""

import functools
import http.server
import io
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image


def png(level: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (level, level // 2, 255 - level)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, entries: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar file of regular members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def shards(folder: Path, counts: Iterable[int], side: int = 16) -> Path:
    """Write shards 000.tar … with `counts` labeled images each, every image with its own gray level."""
    level = 0
    for index, count in enumerate(counts):
        entries = []
        for i in range(count):
            entries.append((f"{i:06d}.png", png(level % 256, side)))
            entries.append((f"{i:06d}.cls", str(level % 7).encode()))
            level += 1
        shard(folder / f"{index:03d}.tar", entries)
    return folder


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files in a folder, and parts of them, as object stores do."""

    serves_ranges = True
    failures = 0
    """The number of requests that will fail next."""

    def do_GET(self) -> None:
        cls = type(self)
        self.server.requests.append((self.path, self.headers.get("Range")))
        if cls.failures:
            cls.failures -= 1
            self.send_error(503)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file() or not self.headers.get("Range") or not self.serves_ranges:
            super().do_GET()
            return
        size = path.stat().st_size
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        begin, end = int(first), min(int(last), size - 1)
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_HEAD(self) -> None:
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
        else:
            super().do_HEAD()

    def log_message(self, *_: object) -> None:
        """Suppress the log."""


@contextmanager
def served(folder: Path, serves_ranges: bool = True) -> Iterator[tuple[str, http.server.ThreadingHTTPServer]]:
    """Serve a folder over HTTP. Yields its URL and the server, whose `requests` lists the requests."""
    kind = type("Handler", (RangeHandler,), {"serves_ranges": serves_ranges, "failures": 0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder)))
    server.requests, server.kind = [], kind
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
