"""Pictures from clients, whatever protocol they come by: from bytes or a URL to one frame, within a server's bounds."""

from __future__ import annotations

import asyncio

from stepwell.config.schema import ServingOptions
from stepwell.errors import Unsupported
from stepwell.media.fetch import FetchPolicy, read_url
from stepwell.media.uploads import PictureDecoder, UploadLimits
from stepwell.types import Frames


class Incoming:
    """One server's bounds, and its decoder."""

    def __init__(self, options: ServingOptions):
        self.max_bytes = options.max_upload_mb * 2**20
        self._decoder = PictureDecoder(UploadLimits(max_bytes=self.max_bytes, max_pixels=int(options.max_input_megapixels * 1e6)))
        self._policy = FetchPolicy(allowed_hosts=tuple(options.url_input_hosts), max_bytes=self.max_bytes)
        self._allows_urls = options.allow_url_inputs

    async def picture(self, data: bytes, name: str) -> Frames:
        """A picture's file as one RGB frame, upright, without metadata."""
        decoded = await asyncio.to_thread(self._decoder.decode, data, name)
        return Frames(decoded.data, 1, decoded.height, decoded.width)

    async def picture_at(self, url: str, name: str) -> Frames:
        """The picture at a client's URL: data: always, others where the server's operator allows it."""
        if not self._allows_urls and not url[:5].lower() == "data:":
            raise Unsupported(
                f"{name}: fetching URLs is off on this server; send the picture as a file, or as a data: URL", param=name
            )
        return await self.picture(await asyncio.to_thread(read_url, url, self._policy, name), name)

    def close(self) -> None:
        self._decoder.close()
