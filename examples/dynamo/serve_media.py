"""Serves a folder of pictures and videos over HTTP, read-only, without listings, whole or by one range, as browsers ask for a
place in a video: what --http-url may point to for file URLs.

    python examples/dynamo/serve_media.py /tmp/stepwell-dynamo-0/media --port 9000
    examples/dynamo/launch/image_diffusion.sh --http-url http://127.0.0.1:9000

For a machine or two. Large sites have nginx, or a bucket.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import os
import re
from http import HTTPStatus
from typing import Any

CHUNK_BYTES = 2**20


class Media(http.server.SimpleHTTPRequestHandler):
    """Files only. A browser takes none of them for a page."""

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def translate_path(self, path: str) -> str:
        """The file that a path names. One with a null byte, as no file has it, names none."""
        return super().translate_path(path).replace("\0", "/\N{REPLACEMENT CHARACTER}/")

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # browsers hang up on what they no longer want
            path = self.translate_path(self.path)
            if "Range" not in self.headers or "If-Modified-Since" in self.headers or not os.path.isfile(path):
                return super().do_GET()
            changed, size = self.date_time_string(os.path.getmtime(path)), os.path.getsize(path)
            is_same = self.headers.get("If-Range", changed) == changed
            asked = span(self.headers["Range"], size) if is_same else None
            if asked is None:
                return super().do_GET()
            self.send_part(path, asked, size, changed)

    def send_part(self, path: str, asked: tuple[int, int], size: int, changed: str) -> None:
        first, stop = asked
        if first >= stop:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(path))
        self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - first))
        self.send_header("Last-Modified", changed)
        self.end_headers()
        with open(path, "rb") as file:
            file.seek(first)
            while first < stop and (piece := file.read(min(CHUNK_BYTES, stop - first))):
                self.wfile.write(piece)
                first += len(piece)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'none'; sandbox")
        super().end_headers()


def span(header: str, size: int) -> tuple[int, int] | None:
    """The first byte of a Range header and the one behind the last, nothing between them if the file ends before; None for what
    is to be answered with all of the file, such as several ranges (RFC 9110, 14.2)."""
    match = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    if match[2] and int(match[2]) < int(match[1]):
        return None
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9000)
    options = parser.parse_args()
    handler = functools.partial(Media, directory=options.folder)
    http.server.ThreadingHTTPServer((options.host, options.port), handler).serve_forever()


if __name__ == "__main__":
    main()
