"""What can be told to packing images."""

from typing import Annotated, Literal

from quarterview.config import FIRST, PATH, POSITIONAL, RESEARCH, Ge, Le, Text, Texts, part
from quarterview.errors import UserError


@part
class PackConfig:
    """Make images small once, in few files that are read fast."""

    data: Annotated[Texts, POSITIONAL, PATH]
    """Images: anything that --data of pretrain takes; with --verify, the packed store."""
    out: Annotated[Text, FIRST, PATH] = ""
    """The folder to write; the same command goes on with one that was interrupted."""
    short_side: Annotated[int | None, Ge(1), FIRST] = 256
    """Pixels that the shorter side of larger pictures is reduced to; unset keeps every picture's size."""
    encoding: Annotated[Literal["raw", "jpeg"], FIRST] = "raw"
    """raw pixels are read fastest; JPEG takes a ninth of the space. Pictures that JPEG cannot hold, such
    as those of 16 bits, are stored raw in any case."""
    quality: Annotated[int, Ge(1), Le(95)] = 90
    """Of --encoding jpeg: 1 to 95."""
    shard_size: Annotated[int, Ge(1), RESEARCH] = 1024
    """Images in a shard."""
    in_chans: Annotated[int, Ge(1)] = 3
    """Channels of the pictures; a store of 1 can be read as any number."""
    part: Text = "0/1"
    """Which share of the shards to write, such as 0/4 on the first of four machines."""
    workers: Annotated[int | None, Ge(0)] = None
    """Processes that write shards; by default one a core, eight at most. 0 writes in the main process."""
    max_bad_samples: Annotated[float, Ge(0), Le(1)] = 0.01
    """Share of broken images above which packing stops. Broken images are recorded, and keep their place."""
    verify: bool = False
    """Check every checksum of a packed store, and write nothing."""

    def __post_init__(self) -> None:
        if self.verify and (len(self.data) != 1 or self.out):
            raise UserError(
                "--verify checks one packed store and writes nothing. Use quarterview pack STORE --verify."
            )
        if not (self.verify or self.out):
            raise UserError("no folder for the packed store. Give --out STORE.")
        self.share(0)

    def share(self, shards: int) -> range:
        """The numbers of the shards that this part writes, of all."""
        number, slash, parts = self.part.partition("/")
        if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
            raise UserError(
                f"--part {self.part} is no share of the shards. Give such as 0/4, for the first of four."
            )
        return range(int(number), shards, int(parts))
