"""Images in tar shards, named as WebDataset names them, read by byte offset from a disk or from elsewhere."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from quarterview.data.decode import croppable_file, decode
from quarterview.data.sources.base import BadSampleError, Croppable, Picture, digest
from quarterview.data.sources.files import printable
from quarterview.data.sources.shard_cache import ShardCache, ShardReader
from quarterview.data.sources.shards import find_shards, is_remote, is_unchanged
from quarterview.data.sources.tar_headers import BLOCK, is_header_of, named
from quarterview.data.sources.tar_index import Say, TarIndex, open_index
from quarterview.errors import UserError

_NAMES_KEPT = 1024


class TarSource:
    """The samples of tar shards: the members that share a key, ``KEY.jpg`` and ``KEY.cls``.

    Nothing is extracted. Where the samples lie is in an index (`tar_index`), which is mapped, so that a set
    of any size opens at once. An image is read with the header before it, which must be the one of then.

    Args:
        spec: a .tar file, a folder of them, a pattern, or braces, as a path or a URL; see `find_shards`.
        channels: how many channels the pictures shall have.
        cache: where copies of remote shards are kept; None reads each image by itself.
        say: told what takes a while.

    Raises:
        UserError: if there is no shard, no image in any, or one cannot be read.
        RunError: if a remote shard cannot be read.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self, spec: str, channels: int, cache: ShardCache | None = None, say: Say | None = None
    ) -> None:
        self.spec, self.channels, self._reader = spec, channels, ShardReader(cache)
        self.shards = find_shards(spec)
        self._open(open_index(self.shards, say))
        if not len(self):
            seen = "".join(f"\n  {line}" for line in self.remarks())
            raise UserError(
                f"no image in the {len(self.shards)} tar shards of {spec}; accepted: members such as "
                f"KEY.jpg, with KEY.cls for a label{seen}"
            )

    def _open(self, index: TarIndex) -> None:
        self._index, self._folder = index, index.folder
        self._names: OrderedDict[int, str] = OrderedDict()
        self._naming = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        names = ("spec", "channels", "shards", "_reader", "_folder")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = dict(state)
        self._open(TarIndex(self._folder, is_checked=False))

    @property
    def is_remote(self) -> bool:
        """Whether its shards are."""
        return is_remote(self.spec)

    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: the first sample of each shard, and the number of all."""
        return self._index.starts

    def remarks(self) -> list[str]:
        """A sentence for each kind of oddity in the shards."""
        return [
            f"{count} in tar shards: {kind} ({', '.join(examples)}{', …' if count > len(examples) else ''})"
            for kind, (count, examples) in sorted(self._index.faults.items())
        ]

    def image(self, index: int) -> Picture:
        return decode(self._content(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return croppable_file(self._content(index), self.channels)

    def label(self, index: int) -> int | None:
        self._check(index)
        label = -1 if self._index.labels is None else int(self._index.labels[index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        """The shard and the member."""
        shard, offset, _ = self._place(index)
        with self._naming:
            known = self._names.get(index)
        if known is not None:
            return known
        try:
            return self._named(index, shard, self._read(shard, offset - BLOCK, BLOCK))
        except OSError:
            return f"{self.shards[shard].name} byte {offset}"

    def fingerprint(self) -> str:
        """Over the shards' names and sizes, the names and sizes of their members, and the labels."""
        facts = ((shard.name, shard.size) for shard in self.shards)
        return digest("tar", *facts, *self._index.contents)

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")

    def _place(self, index: int) -> tuple[int, int, int]:
        """The shard of an image, and where in it the image begins and how long it is, in bytes."""
        self._check(index)
        shard = int(np.searchsorted(self._index.starts, index, side="right")) - 1
        block, length = self._index.samples[index].item()
        return shard, block * BLOCK, length

    def _content(self, index: int) -> bytes:
        """An image as it is encoded."""
        shard, offset, length = self._place(index)
        try:
            data = self._read(shard, offset - BLOCK, BLOCK + length)
        except OSError as error:
            raise BadSampleError(f"cannot be read: {error}") from error
        header = data[:BLOCK]
        self._named(index, shard, header)
        whole = len(data) == BLOCK + length and is_header_of(header, length)
        if not whole or not is_unchanged(self.shards[shard]):
            raise BadSampleError("cannot be read: its shard is not the one that was indexed")
        return data[BLOCK:]

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        """Bytes of a shard. Raises OSError, of a remote one RunError."""
        return self._reader.read(self.shards[shard], offset, length)

    def _named(self, index: int, shard: int, header: bytes) -> str:
        """The name of an image, kept for a while, as who reports of it asks next."""
        name = f"{self.shards[shard].name}/{printable(self._index.long_name(index) or named(header))}"
        with self._naming:
            self._names[index] = name
            if len(self._names) > _NAMES_KEPT:
                self._names.popitem(last=False)
        return name
