"""The background part of a save: wait for the arrays, digest, write the manifest, rename, delete old steps."""

import dataclasses
import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from dovetail_checkpoint import _files
from dovetail_checkpoint.keep import Committed, Policy
from dovetail_checkpoint.manifest import DATA, MANIFEST, Leaf, Manifest, digest_files

__all__ = ["Job", "finish"]

_LOG = logging.getLogger("dovetail_checkpoint")
_LIBRARIES = ("dovetail-checkpoint", "jax", "jaxlib", "numpy", "orbax-checkpoint", "tensorstore")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A step on its way; `data` and `meta` are JSON texts."""

    step: int
    root: Path
    staging: Path
    leaves: Mapping[str, Leaf]
    data: str | None
    meta: str
    metrics: Mapping[str, float]

    @property
    def written(self) -> Path:
        """Where the step lies before it is committed."""
        return self.staging / str(self.step)

    @property
    def final(self) -> Path:
        """Where the step lies when it is committed."""
        return self.root / str(self.step)


def finish(
    job: Job, pending: Any, keep: Policy, metrics: dict[int, Mapping[str, float]], fault: Callable[[str], None]
) -> None:
    """Commit a step whose arrays are being written, then delete what the policy does not keep.

    `fault` is called with ``orbax`` (arrays are being written), ``manifest`` (they are written), ``commit`` (all is
    ready for the rename) and ``delete`` (before each deletion); what it raises is a failure at that point.
    """
    from dovetail_checkpoint import _orbax

    try:
        _write(job, pending, fault)
        if _is_primary():
            metrics[job.step] = job.metrics
            _delete_old(job, keep, metrics, fault)
    finally:
        # The others go on when process 0 has committed and deleted, or given up.
        _orbax.barrier(f"commit-{job.staging.name}")
    if not job.final.is_dir():
        raise RuntimeError(f"process 0 did not commit step {job.step} in {job.root}; its log says why")


def _write(job: Job, pending: Any, fault: Callable[[str], None]) -> None:
    try:
        try:
            fault("orbax")
        finally:
            pending.wait()
        if _is_primary():
            _commit(job, fault)
    except BaseException as error:
        error.add_note(f"raised in the background save of step {job.step}, which is not committed")
        raise
    finally:
        if _is_primary():
            _files.discard_quietly(job.staging)


def _commit(job: Job, fault: Callable[[str], None]) -> None:
    fault("manifest")
    if job.data is not None:
        (job.written / DATA).write_text(job.data)
    manifest = Manifest(
        step=job.step,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        leaves=job.leaves,
        files=digest_files(job.written),
        meta=json.loads(job.meta),
        metrics=job.metrics,
        data=None if job.data is None else xxhash.xxh3_128_hexdigest(job.data.encode()),
        versions={"python": sys.version.split()[0]} | {name: version(name) for name in _LIBRARIES},
    )
    (job.written / MANIFEST).write_text(manifest.to_json())
    _files.sync(job.written / MANIFEST)
    _files.sync_directories(job.written)
    fault("commit")
    _files.commit(job.written, job.final)


def _delete_old(job: Job, keep: Policy, metrics: dict[int, Mapping[str, float]], fault: Callable[[str], None]) -> None:
    history: list[Committed] = []
    for step in _files.steps(job.root):
        if step not in metrics:
            try:
                metrics[step] = Manifest.read(job.root / str(step)).metrics
            except ValueError as error:
                _LOG.warning("step %d is not counted by the keep policy, nor deleted: %s", step, error)
                continue
        history.append(Committed(step, metrics[step]))
    stay = keep.kept(history) | {job.step, max((entry.step for entry in history), default=job.step)}
    for entry in history:
        if entry.step not in stay:
            fault("delete")
            _files.discard(job.root / str(entry.step))


def _is_primary() -> bool:
    from dovetail_checkpoint import _multihost

    return _multihost.is_primary()
