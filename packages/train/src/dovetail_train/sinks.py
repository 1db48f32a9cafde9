"""Where numbers go: JSON lines, deterministic values apart from wall times."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["JsonLines"]

logger = logging.getLogger("dovetail_train")


class JsonLines:
    """Writes ``metrics.jsonl`` and ``timings.jsonl`` into a directory; meets `dovetail_protocols.Sink`.

    One line per step and value kind, ``{"step": 3, "loss": 2.5}``, written in whole as soon as it is known, so that a
    killed process loses nothing. A run that resumes after step `resume` drops what came after it: the metrics of an
    interrupted run end byte-identical to those of an uninterrupted one.

    Args:
        directory: made if missing.
        resume: the last step to keep; None starts anew and refuses to add to existing files.

    Raises:
        FileExistsError: without `resume`, a file exists.
    """

    def __init__(self, directory: str | os.PathLike[str], *, resume: int | None = None) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / "metrics.jsonl", folder / "timings.jsonl"]
        if resume is None and (old := [str(path) for path in paths if path.exists()]):
            raise FileExistsError(f"{', '.join(old)} exist; pass resume=STEP to continue a run or another directory")
        if resume is not None:
            for path in paths:
                _keep_until(path, resume)
        self._files = [path.open("ab", buffering=0) for path in paths]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append deterministic values; NaN and infinities are written as null."""
        self._write(0, step, values)

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Append wall times and rates."""
        self._write(1, step, values)

    def _write(self, which: int, step: int, values: Mapping[str, float]) -> None:
        finite = {name: float(v) if math.isfinite(v) else None for name, v in values.items()}
        self._files[which].write((json.dumps({"step": step, **finite}) + "\n").encode())

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, and a last line that a killed process left unfinished; atomically."""
    if not path.exists():
        return
    kept = list[bytes]()
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            logger.warning("%s: dropped an unfinished line %r", path, line[:80])
            continue
        if line.endswith(b"\n") and record["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(path)
