"""Where weights rest while nothing computes with them, and the rooms on the device that they are fetched into.

A CPU's weights rest in a file, a GPU's in the machine's memory. Copies run beside the computing: a thread reads the file,
a stream of its own feeds the GPU.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from stepwell.config.paths import nameless_file, unwritable

PIECE_BYTES = 2**30  # of the file that are mapped at once: each mapping takes a file descriptor


class Room(Protocol):
    """Memory of the device that holds one block at a time."""

    @property
    def memory(self) -> Tensor: ...  # (bytes,) uint8

    def fill(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin to copy what is at home into views of this memory, after whatever still reads it."""
        ...

    def wait(self) -> None:
        """What was filled may be read by what is computed from now on. Raises OSError if it could not be read."""
        ...

    def leave(self) -> None:
        """What has been asked to compute so far is the last to read what is here."""
        ...

    def close(self) -> None:
        """Nothing writes here any more."""
        ...


class Home(Protocol):
    """Where tensors rest."""

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values, type and shape at home; a tensor that is at home already comes back as it is."""
        ...

    def room(self, size_bytes: int) -> Room: ...


# ---------------------------------------------------------------------------------------------------------------- a file
class FileHome:
    """A file without a name. What `keep` gives is mapped from it.

    folder: where; the system's temporary folder if None. It has to be on a disk: a file in memory saves none.
    """

    def __init__(self, folder: str | None = None):
        folder = folder or tempfile.gettempdir()
        self._shown = f"offload_path = {folder!r}"
        self._file = nameless_file(Path(folder), "offload_path", self._shown)
        self._piece = memoryview(b"")  # what is mapped of the file's end, from `_begin` on
        self._begin = self._end = 0
        self._offsets: dict[int, int] = {}  # by address
        self._reader = ThreadPoolExecutor(1, "stepwell-fetch")

    def keep(self, tensor: Tensor) -> Tensor:
        if tensor.data_ptr() in self._offsets or not tensor.nbytes:
            return tensor
        content = _bytes(tensor.detach().contiguous())
        offset, size = self._end, tensor.nbytes
        try:
            if offset + size > self._begin + len(self._piece):
                self._map(max(size, PIECE_BYTES))
            _write(self._file.fileno(), content, offset)
        except OSError as error:
            raise unwritable(error, "offload_path", self._shown) from None
        pages = -(-size // mmap.ALLOCATIONGRANULARITY)
        self._end += pages * mmap.ALLOCATIONGRANULARITY
        mapped = self._piece[offset - self._begin : offset - self._begin + size]
        kept = torch.frombuffer(mapped, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)
        self._offsets[kept.data_ptr()] = offset
        return kept

    def _map(self, size: int) -> None:
        """Map so much behind what is written. The file is longer by that, and takes room on the disk as it is written."""
        os.ftruncate(self._file.fileno(), self._end + size)
        self._piece = memoryview(mmap.mmap(self._file.fileno(), size, offset=self._end))
        self._begin = self._end

    def room(self, size_bytes: int) -> Room:
        return _ReadRoom(self, size_bytes)

    def read(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Future[None]:
        """Read what is kept into other tensors, on the thread that does nothing else."""
        # not through the mapping: that would keep its pages in the process, and wait for the disk page by page
        orders = [
            (self._offsets[source.data_ptr()], _bytes(target))
            for source, target in zip(sources, targets, strict=True)
            if source.nbytes
        ]
        return self._reader.submit(self._read, orders)

    def _read(self, orders: list[tuple[int, memoryview]]) -> None:
        for offset, content in orders:
            while content:
                count = os.preadv(self._file.fileno(), [content], offset)
                if count == 0:
                    raise OSError("the file that holds the weights has been cut short")
                content, offset = content[count:], offset + count


class _ReadRoom:
    """Memory that is read into from a file."""

    def __init__(self, home: FileHome, size_bytes: int):
        self.memory = torch.empty(size_bytes, dtype=torch.uint8)
        self._home = home
        self._coming: Future[None] | None = None

    def fill(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self._coming = self._home.read(sources, targets)  # the thread takes one order after the other

    def wait(self) -> None:
        if self._coming is not None:
            self._coming.result()

    def leave(self) -> None:
        pass  # a CPU has computed when it returns

    def close(self) -> None:
        with suppress(OSError):
            self.wait()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(file: int, content: memoryview, offset: int) -> None:
    while content:
        count = os.pwrite(file, content, offset)
        content, offset = content[count:], offset + count


# ------------------------------------------------------------------------------------------------------- memory, for a GPU
class MemoryHome:
    """The machine's memory, from where a GPU fetches. Pinned memory can't be paged out, and is copied in the background."""

    def __init__(self, *, pin: bool):
        self._pin = pin
        self._stream: Any = torch.cuda.Stream()

    def keep(self, tensor: Tensor) -> Tensor:
        return at_home(tensor, pin=self._pin)

    def room(self, size_bytes: int) -> Room:
        return _CopyRoom(self._stream, size_bytes)


class _CopyRoom:
    """GPU memory that is copied into on a stream of its own; events keep the copies and the computing apart."""

    def __init__(self, stream: Any, size_bytes: int):
        self.memory = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
        self._stream = stream
        self._filled, self._left = torch.cuda.Event(), torch.cuda.Event()
        self.leave()

    def fill(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self._stream.wait_event(self._left)
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            self._filled.record()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._filled)

    def leave(self) -> None:
        self._left.record()

    def close(self) -> None:
        self._stream.synchronize()


def at_home(tensor: Tensor, *, pin: bool) -> Tensor:
    """The tensor in the machine's memory, pinned if asked for."""
    tensor = tensor.detach().cpu()
    return tensor.pin_memory() if pin and not tensor.is_pinned() else tensor
