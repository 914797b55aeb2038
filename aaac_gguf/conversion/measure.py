"""Measure what conversions of a model go by, once, and keep it in a folder for all of them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import AaacError
from ..files.atomic import sync_folder
from ..files.imatrix import Coverage
from ..files.journal import Journal
from ..files.output import check_space
from ..files.scratch import folder_beside
from ..models.source import full_precision
from ..models.weights import check_weights
from ..resources import peak_bytes
from .calibrate import calibrate
from .coverage import coverage
from .job import Job, prepare
from .measurements import SETTINGS, Measurements
from .settings import Settings


@dataclass(frozen=True)
class MeasureReport:
    """The result of `measure`; see `convert.Report` for the fields."""

    folder: Path
    n_bytes: int
    coverage: Coverage | None
    seconds: float
    peak_bytes: int


def measure(source: Path, out: Path, settings: Settings) -> MeasureReport:
    """Run the calibration of `source`, and keep what it measured in a new folder `out`.

    Raises AaacError for bad input, before anything slow if that is possible. An error or an interruption leaves
    nothing.
    """
    start = time.monotonic()
    settings.check_device()
    _check_folder(out)
    with Journal(out), folder_beside(out) as scratch:
        kept = scratch / "measurements"
        kept.mkdir(parents=True)
        with full_precision(source, scratch, header_only=True) as header:
            job = prepare(source, header, settings)
            n_bytes = job.calibration_bytes(header)
            check_space(out, n_bytes, job.scratch_bytes(header) - n_bytes, 0)
        with full_precision(source, scratch) as file:
            digest = check_weights(file)
            calibration = calibrate(job, file, scratch, kept)
            found = coverage(job, calibration.imatrix)
            measured = calibration.measured
            n_text, sequences = 0, None
            if measured:
                n_text, sequences = measured.activations.n_text, measured.activations.sequences
            _measurements(job, kept, digest, n_text).write(calibration.imatrix, sequences)
        n_bytes = _synced_bytes(kept)
        os.rename(kept, out)
        sync_folder(out.parent)
    return MeasureReport(out, n_bytes, found, time.monotonic() - start, peak_bytes())


def _measurements(job: Job, folder: Path, digest: str, n_text: int) -> Measurements:
    settings, given = job.settings, job.calibration
    calibration = {"none": "none", "self": "self", "imatrix": None}.get(given.kind, settings.calibration or "bundled")
    kept = {name: getattr(settings, name) for name in SETTINGS} | {"calibration": calibration}
    return Measurements(folder, digest, kept, given.kind, given.description, given.n_tokens, n_text, job.searched)


def _check_folder(out: Path) -> None:
    """Raise AaacError unless a folder can be made at `out`."""
    if out.exists():
        raise AaacError(f"`output` {out}: exists already; remove it, or choose another name")
    if not out.parent.is_dir():
        raise AaacError(f"{out}: there is no directory {out.parent}; make it first")


def _synced_bytes(folder: Path) -> int:
    """Wait until the files of a folder are on disk. Return the bytes that they take."""
    n_bytes = 0
    for path in folder.iterdir():
        with open(path, "rb") as f:
            os.fsync(f.fileno())
            n_bytes += os.fstat(f.fileno()).st_size
    return n_bytes
