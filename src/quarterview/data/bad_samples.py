"""What was broken or converted on the way in, each image once."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from quarterview.data.reading import Report
from quarterview.errors import RunError

_NOTED_MOST = 100_000
_SHOWN = 3


class Ledger:
    """Counts broken and converted images, and stops a run that has too many broken ones.

    Broken images go to `path` as one JSON line each, kept across resumes; conversions are counted. Those of
    before a resume count once they are met again: what made them broken may be gone.

    Args:
        path: of ``bad_samples.jsonl``; None keeps the ledger in memory.
        size: images in the set.
        limit: share of them that may be broken.
        collect: brings together what every rank says, where there are several; None for one alone.
    """

    def __init__(
        self,
        path: Path | None,
        size: int,
        limit: float,
        collect: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.path, self.size, self.limit, self.collect = path, size, limit, collect
        self._untold: list[tuple[int, str, str]] = []  # what the other ranks do not know yet
        self.broken: dict[int, str] = {}
        self._listed: set[int] = set()  # in the file
        self.converted: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)
        self._noted: set[int] = set()
        if path is not None and path.exists():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(whole), "utf-8")
            partial.replace(path)
            self._listed = {json.loads(line)["id"] for line in whole}

    def __call__(self, report: Report) -> None:
        """Take down one report. Raises RunError if the broken images are now too many.

        Where there are several ranks, `exchange` finds that out, for all of them at once.
        """
        if report.broken is None:
            if report.sample not in self._noted and len(self._noted) < _NOTED_MOST:
                self._noted.add(report.sample)
                self.converted.update(report.notes)
                for note in report.notes:
                    if len(self._examples[note]) < _SHOWN:
                        self._examples[note].append(report.name)
            return
        if report.sample not in self.broken:
            self._take_down(report.sample, report.name, report.broken)
            self._untold.append((report.sample, report.name, report.broken))
        if self.collect is None:
            self.check()

    def _take_down(self, sample: int, name: str, reason: str) -> None:
        self.broken[sample] = f"{name}: {reason}"
        if self.path is not None and sample not in self._listed:
            self._listed.add(sample)
            row = {"id": sample, "name": name, "reason": reason}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def exchange(self) -> None:
        """Tell the other ranks of the images found broken here since, and learn of theirs; all call this.

        Raises:
            RunError: on every rank, if the broken images are now too many.
        """
        if self.collect is None:
            return
        mine, self._untold = self._untold, []
        for text in self.collect(json.dumps(mine)):
            for sample, name, reason in json.loads(text):
                if sample not in self.broken:
                    self._take_down(sample, name, reason)
        self.check()

    def check(self) -> None:
        """Raises RunError if more than the allowed share of the set is broken."""
        if len(self.broken) <= self.limit * self.size:
            return
        shown = "\n".join(f"  {why}" for why in list(self.broken.values())[:10])
        raise RunError(
            f"{len(self.broken)} of {self.size} images are broken, which is more than the "
            f"{self.limit:.2%} that --max-bad-samples allows:\n{shown}\n"
            "Mend or remove them, or allow more with --max-bad-samples."
        )

    def summary(self) -> list[str]:
        """A sentence for each thing worth saying."""
        lines = []
        if self.broken:
            listed = "" if self.path is None else f"; listed in {self.path.name}"
            lines.append(f"{len(self.broken)} broken image(s), others take their place{listed}:")
            lines += [f"  {why}" for why in list(self.broken.values())[:10]]
        more = " or more" if len(self._noted) >= _NOTED_MOST else ""
        for note, count in sorted(self.converted.items()):
            examples = ", ".join(self._examples[note]) + (", …" if count > _SHOWN else "")
            lines.append(f"{count}{more} image(s): {note} ({examples})")
        return lines
