"""Read images in WebDataset tar shards by byte offset, from a disk or over a network."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from quarterview.data.decode import decode, open_croppable_file
from quarterview.data.sources.base import BadSampleError, Croppable, DecodedImage, compute_digest
from quarterview.data.sources.files import to_printable
from quarterview.data.sources.shard_cache import ShardCache, ShardReader
from quarterview.data.sources.shards import find_shards, is_remote, is_unchanged
from quarterview.data.sources.tar_headers import BLOCK, is_header_of, parse_name
from quarterview.data.sources.tar_index import Log, TarIndex, open_index
from quarterview.errors import UserError

_MAX_CACHED_NAMES = 1024


class TarSource:
    """A data source of tar shards. A sample is the members that share a key, ``KEY.jpg`` and ``KEY.cls``.

    Nothing is extracted. An index (`tar_index`) holds the offset of each sample. It is memory-mapped, so that
    a data set of any size opens at once. Each image is read together with its tar header, to detect a shard
    that has changed since it was indexed.

    Args:
        spec: a .tar file, a folder of them, a glob, or a range in braces, as a path or a URL; see
            `find_shards`.
        channels: number of channels of the images that are returned.
        cache: cache for copies of remote shards; None to read each image from its server.
        log: called with a line of text before something that takes long.

    Raises:
        UserError: if there is no shard, no shard holds an image, or a shard cannot be read.
        RunError: if a remote shard cannot be read.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self, spec: str, channels: int, cache: ShardCache | None = None, log: Log | None = None
    ) -> None:
        self.spec, self.channels, self._reader = spec, channels, ShardReader(cache)
        self.shards = find_shards(spec)
        self._open(open_index(self.shards, log))
        if not len(self):
            remarks = "".join(f"\n  {line}" for line in self.remarks())
            raise UserError(
                f"The {len(self.shards)} tar shards of {spec} contain no image. Give shards with members "
                f"such as KEY.jpg, and KEY.cls for a label.{remarks}"
            )

    def _open(self, index: TarIndex) -> None:
        self._index, self._folder = index, index.folder
        self._names: OrderedDict[int, str] = OrderedDict()
        self._names_lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._index.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        names = ("spec", "channels", "shards", "_reader", "_folder")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = dict(state)
        self._open(TarIndex(self._folder, verify=False))

    @property
    def is_remote(self) -> bool:
        """True if the shards are read over a network."""
        return is_remote(self.spec)

    def shard_starts(self) -> np.ndarray:
        """Return int64 [num_shards + 1]: the first sample of each shard, and the number of samples."""
        return self._index.starts

    def remarks(self) -> list[str]:
        """Return a sentence on each kind of fault in the shards, with a few examples."""
        return [
            f"{count} in tar shards: {fault} ({', '.join(examples)}{', …' if count > len(examples) else ''})"
            for fault, (count, examples) in sorted(self._index.faults.items())
        ]

    def image(self, index: int) -> DecodedImage:
        return decode(self._read_image(index), self.channels)

    def croppable(self, index: int) -> Croppable:
        return open_croppable_file(self._read_image(index), self.channels)

    def label(self, index: int) -> int | None:
        self._check_index(index)
        label = -1 if self._index.labels is None else int(self._index.labels[index])
        return label if label >= 0 else None

    def name(self, index: int) -> str:
        """Return the name of the shard and of the member: ``000.tar/KEY.jpg``."""
        shard, offset, _ = self._locate(index)
        with self._names_lock:
            cached = self._names.get(index)
        if cached is not None:
            return cached
        try:
            return self._remember_name(index, shard, self._read_range(shard, offset - BLOCK, BLOCK))
        except OSError:
            return f"{self.shards[shard].name} byte {offset}"

    def fingerprint(self) -> str:
        """Return a digest of the shards' names and sizes, the members' names and sizes, and the labels."""
        facts = ((shard.name, shard.size) for shard in self.shards)
        return compute_digest("tar", *facts, *self._index.content_digests)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Return the shard of an image, and the offset and length of the image in the shard, in bytes."""
        self._check_index(index)
        shard = int(np.searchsorted(self._index.starts, index, side="right")) - 1
        block, length = self._index.samples[index].item()
        return shard, block * BLOCK, length

    def _read_image(self, index: int) -> bytes:
        """Return the encoded bytes of an image. Raises BadSampleError if the shard has changed."""
        shard, offset, length = self._locate(index)
        try:
            data = self._read_range(shard, offset - BLOCK, BLOCK + length)
        except OSError as error:
            raise BadSampleError(f"cannot be read: {error}") from error
        header = data[:BLOCK]
        self._remember_name(index, shard, header)
        is_same = len(data) == BLOCK + length and is_header_of(header, length)
        if not is_same or not is_unchanged(self.shards[shard]):
            raise BadSampleError("cannot be read: the shard has changed since it was indexed")
        return data[BLOCK:]

    def _read_range(self, shard: int, offset: int, length: int) -> bytes:
        """Return bytes of a shard. Raises OSError for a local shard, RunError for a remote one."""
        return self._reader.read(self.shards[shard], offset, length)

    def _remember_name(self, index: int, shard: int, header: bytes) -> str:
        """Return the name of an image, and cache it, because a report on the image needs it next."""
        name = f"{self.shards[shard].name}/{to_printable(self._index.long_name(index) or parse_name(header))}"
        with self._names_lock:
            self._names[index] = name
            if len(self._names) > _MAX_CACHED_NAMES:
                self._names.popitem(last=False)
        return name
