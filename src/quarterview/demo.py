"""The whole idea in a few minutes, without data and without a network."""

from quarterview.train.journal import Journal


def demo(out: str, seed: int, journal: Journal) -> bool:
    raise NotImplementedError
