"""Record which images were broken or converted, each image once."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from quarterview.data.reading import SampleReport
from quarterview.errors import RunError

_MAX_NOTED = 100_000
_NUM_EXAMPLES = 3


class BadSampleLog:
    """Count broken and converted images, and stop a run that has too many broken ones.

    Each broken image is a JSON line in `path`, which is kept when a run resumes. After a resume an image
    counts as broken only when it is read again, because the fault may have been repaired.

    Args:
        path: path of ``bad_samples.jsonl``; None keeps the log in memory.
        num_images: number of images in the data set.
        max_fraction: fraction of the images that may be broken.
        gather: returns the texts that all ranks pass to it; None if there is one rank.
    """

    def __init__(
        self,
        path: Path | None,
        num_images: int,
        max_fraction: float,
        gather: Callable[[str], list[str]] | None = None,
    ) -> None:
        self.path, self.num_images, self.max_fraction, self.gather = path, num_images, max_fraction, gather
        self._unsynced: list[tuple[int, str, str]] = []  # not yet sent to the other ranks
        self.broken: dict[int, str] = {}
        self._listed: set[int] = set()  # ids that are in the file
        self.converted: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = defaultdict(list)
        self._noted: set[int] = set()
        if path is not None and path.exists():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            # The last line may be incomplete if the process was killed.
            whole = [line for line in lines if line.endswith("\n")]
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text("".join(whole), "utf-8")
            partial.replace(path)
            self._listed = {json.loads(line)["id"] for line in whole}

    def __call__(self, report: SampleReport) -> None:
        """Record a report. With several ranks, `synchronize` checks the limit instead.

        Raises:
            RunError: if too many images are broken.
        """
        if report.broken is None:
            if report.sample_id not in self._noted and len(self._noted) < _MAX_NOTED:
                self._noted.add(report.sample_id)
                self.converted.update(report.notes)
                for note in report.notes:
                    if len(self._examples[note]) < _NUM_EXAMPLES:
                        self._examples[note].append(report.name)
            return
        if report.sample_id not in self.broken:
            self._add(report.sample_id, report.name, report.broken)
            self._unsynced.append((report.sample_id, report.name, report.broken))
        if self.gather is None:
            self.check_limit()

    def _add(self, sample_id: int, name: str, reason: str) -> None:
        self.broken[sample_id] = f"{name}: {reason}"
        if self.path is not None and sample_id not in self._listed:
            self._listed.add(sample_id)
            row = {"id": sample_id, "name": name, "reason": reason}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def synchronize(self) -> None:
        """Exchange newly found broken images with the other ranks. All ranks must call this.

        Raises:
            RunError: on every rank, if too many images are broken.
        """
        if self.gather is None:
            return
        own, self._unsynced = self._unsynced, []
        for text in self.gather(json.dumps(own)):
            for sample_id, name, reason in json.loads(text):
                if sample_id not in self.broken:
                    self._add(sample_id, name, reason)
        self.check_limit()

    def check_limit(self) -> None:
        """Raise RunError if the fraction of broken images is above the limit."""
        if len(self.broken) <= self.max_fraction * self.num_images:
            return
        examples = "\n".join(f"  {reason}" for reason in list(self.broken.values())[:10])
        raise RunError(
            f"{len(self.broken)} of {self.num_images} images are broken, which is more than the "
            f"{self.max_fraction:.2%} that --max-bad-samples allows:\n{examples}\n"
            "Repair or remove them, or allow more with --max-bad-samples."
        )

    def summarize(self) -> list[str]:
        """Return lines that describe the broken and the converted images."""
        lines = []
        if self.broken:
            listed = "" if self.path is None else f"; listed in {self.path.name}"
            lines.append(f"{len(self.broken)} broken image(s), replaced by others{listed}:")
            lines += [f"  {reason}" for reason in list(self.broken.values())[:10]]
        more = " or more" if len(self._noted) >= _MAX_NOTED else ""
        for note, count in sorted(self.converted.items()):
            examples = ", ".join(self._examples[note]) + (", …" if count > _NUM_EXAMPLES else "")
            lines.append(f"{count}{more} image(s): {note} ({examples})")
        return lines
