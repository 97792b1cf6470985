"""What every probe of frozen features is given, and the features it compares."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class ProbeConfig:
    """Which features are judged, and on what."""

    run_: str = ""
