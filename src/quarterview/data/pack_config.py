"""Configuration of ``quarterview pack``."""

from typing import Annotated, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, RESEARCH, Ge, Le, Text, Texts, part
from quarterview.errors import UserError, invalid


@part
class PackConfig:
    """Resize images once, and pack them into a few files that are read fast."""

    data: Annotated[Texts, POSITIONAL, PATH]
    """Images: anything that --data of pretrain takes; with --verify, the packed store."""
    out: Annotated[Text, FIRST, PATH] = ""
    """Folder of the packed store. Repeat the command to continue after an interruption."""
    short_side: Annotated[int | None, Ge(1), FIRST] = 256
    """Shorter side of the packed images, in pixels. Smaller images keep their size; unset keeps all."""
    encoding: Annotated[Literal["raw", "jpeg"], FIRST] = "raw"
    """raw pixels are read fastest. jpeg takes about a ninth of the space; images that JPEG cannot store,
    such as 16-bit ones, are stored raw."""
    quality: Annotated[int, Ge(1), Le(95)] = 90
    """JPEG quality for --encoding jpeg, 1 to 95."""
    shard_size: Annotated[int, Ge(1), RESEARCH] = 1024
    """Number of images per shard."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Channels of the packed images. A store with 1 channel can be read with any number of channels."""
    part: Text = "0/1"
    """Part of the shards to write, as INDEX/COUNT: 0/4 on the first of four machines."""
    workers: Annotated[int | None, Ge(0)] = None
    """Processes that write shards. Default: one per core, at most 8. 0 writes in the main process."""
    max_bad_samples: Annotated[float, Ge(0), Le(1)] = 0.01
    """Maximum fraction of broken images before packing stops. They are recorded and keep their index."""
    verify: bool = False
    """Verify the checksums of a packed store, without writing anything."""

    def __post_init__(self) -> None:
        if self.verify and (len(self.data) != 1 or self.out):
            raise UserError(
                "--verify checks one packed store and writes nothing. Use quarterview pack STORE --verify."
            )
        if not (self.verify or self.out):
            raise UserError("A folder for the packed store is missing. Give --out STORE.")
        self.select_shards(0)

    def select_shards(self, num_shards: int) -> range:
        """Return the indices of the shards that --part selects, of `num_shards`."""
        index, slash, num_parts = self.part.partition("/")
        if not (slash and index.isdecimal() and num_parts.isdecimal() and int(index) < int(num_parts)):
            raise invalid("--part", self.part, "INDEX/COUNT, such as 0/4 for the first of four parts")
        return range(int(index), num_shards, int(num_parts))
