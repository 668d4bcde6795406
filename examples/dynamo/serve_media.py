"""Serves a folder of pictures and videos over HTTP, read-only, without listings: what --http-url may point to for file URLs.

    python examples/dynamo/serve_media.py /tmp/stepwell-dynamo-0/media --port 9000
    examples/dynamo/launch/image_diffusion.sh --http-url http://127.0.0.1:9000

For a machine or two. Large sites have nginx, or a bucket.
"""

from __future__ import annotations

import argparse
import functools
import http.server
from http import HTTPStatus
from typing import Any


class Media(http.server.SimpleHTTPRequestHandler):
    """Files only. A browser takes none of them for a page."""

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def translate_path(self, path: str) -> str:
        """The file that a path names. One with a null byte, as no file has it, names none."""
        return super().translate_path(path).replace("\0", "/\N{REPLACEMENT CHARACTER}/")

    def end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "default-src 'none'; sandbox")
        super().end_headers()


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
