"""Keys and values of finished blocks of text, one block a page, shared by all that begin alike.

Under a block-causal mask the keys and values of a block depend on it and on what precedes it only: they are exact for
every sequence with that beginning. So a page is found by the hash of all tokens up to its end, belongs to nobody, and is
nothing but a cache: the one used longest ago is given up for a new one, and who misses it computes it again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from torch import Tensor


def chained(before: bytes, block: Sequence[int]) -> bytes:
    """The hash of a block and of all before it, whose own hash is `before` (empty for none)."""
    return blake2b(before + b"".join(i.to_bytes(4, "little") for i in block), digest_size=16).digest()


class PagePool:
    """A fixed number of pages of `size` tokens. storage: (layers, 2, pages, size, key heads, head_dim)"""

    def __init__(self, layers: int, pages: int, size: int, heads: tuple[int, int], like: Tensor):
        self.size, self.pages = size, pages
        self.storage = like.new_empty(layers, 2, pages, size, *heads)
        self._held: OrderedDict[bytes, int] = OrderedDict()  # hash -> page, the one used longest ago first
        self._free = list(range(pages - 1, -1, -1))
        self._protected: frozenset[bytes] = frozenset()

    @property
    def held(self) -> int:
        """How many pages hold something."""
        return len(self._held)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of blocks, from the first on, that is here."""
        pages = []
        for key in hashes:
            if key not in self._held:
                break
            pages.append(self._held[key])
        return pages

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Count these as used now; the first of them as the latest, since without it the others are of no use."""
        for key in reversed(hashes):
            if key in self._held:
                self._held.move_to_end(key)

    def protect(self, hashes: Sequence[bytes]) -> None:
        """Give none of these up, until the next call: whoever goes first must get on, however little room there is."""
        self._protected = frozenset(hashes)

    def write(self, key: bytes, rows: slice, made: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep a block, if there is room. made: keys and values of each layer, (rows, key heads, head_dim), of which
        `rows` are the block's."""
        if key in self._held:
            return
        if not self._free:
            oldest = next((other for other in self._held if other not in self._protected), None)
            if oldest is None:
                return
            self._free.append(self._held.pop(oldest))
        page = self._free.pop()
        for layer, (k, v) in enumerate(made):
            self.storage[layer, 0, page] = k[rows]
            self.storage[layer, 1, page] = v[rows]
        self._held[key] = page
