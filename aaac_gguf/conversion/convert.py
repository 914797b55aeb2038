"""Convert a checkpoint or a full-precision GGUF: plan, calibrate, encode, write, one tensor in memory at a time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGMLQuantizationType as T

from ..files.gguf import shards
from ..files.imatrix import Coverage
from ..files.journal import Journal, Record
from ..files.output import Output, check_output, check_space
from ..files.scratch import folder_beside, temporary_folder
from ..models import checkpoint
from ..models.source import full_precision
from ..models.weights import check_weights
from ..progress import progress
from ..quantizer.moments import DAMPING
from ..resources import peak_bytes, sha256
from .base import check_base
from .calibrate import Calibration, calibrate
from .coverage import coverage
from .encoder import quantized_tensors
from .exact import keep_exact, may_be_exact
from .job import Job, prepare
from .mixed import mix
from .plan import BY_NATURE, Rounding, TensorPlan
from .settings import Settings


@dataclass(frozen=True)
class TensorReport:
    """The result for one tensor that was rounded by search. Errors are relative squared errors."""

    plan: TensorPlan
    rounding: Rounding
    relative_error: float
    weighted_error: float


@dataclass(frozen=True)
class Report:
    """The result of a conversion, with what its calibration did not reach.

    coverage    None without calibration
    unmeasured  how tensors were rounded of which second moments were to be measured and were not, by name
    exact       the types of tensors that are 4-bit by nature and stored without loss, by name
    not_moved   tensors whose rows were not found in the model that calibration ran: matrices after them were calibrated
                on what their full-precision weights compute
    seconds     of the whole conversion
    peak_bytes  of memory, in this process or in llama.cpp's converter, whichever took more
    damped      tensors whose Hessian needed more damping than usual: too few tokens, or channels that never vary
    left_out    what of the source is in no file
    """

    files: list[Path]
    tensors: list[TensorReport]
    coverage: Coverage | None
    seconds: float
    peak_bytes: int
    damped: list[str]
    left_out: str = ""
    unmeasured: dict[str, Rounding] = field(default_factory=dict)
    not_moved: list[str] = field(default_factory=list)
    exact: dict[str, T] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Return the size of all files together."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True)
class DryRun:
    """The plan of a conversion, with the exact bytes and the number of its files."""

    plans: tuple[TensorPlan, ...]
    n_bytes: int
    n_files: int


def convert(source: Path, out: Path, settings: Settings, resume: bool = False) -> Report:
    """Quantize `source` into `out`; with `resume`, continue a conversion that was interrupted, to the same bytes.

    Raises AaacError for bad input, before anything slow if that is possible. What is finished when an error or an
    interruption ends it stays for `resume` in files with `.partial` in their names. Nothing else stays.
    """
    start = time.monotonic()
    settings.check_device()
    for read in (source, settings.base):
        if read:
            check_output(out, read)
    with Journal(out, resume) as journal, folder_beside(out) as scratch:
        # In the first seconds: everything that can be refused without reading the weights.
        with full_precision(source, scratch, header_only=True) as header:
            job = prepare(source, header, settings)
            layout = job.layout(out)
            check_space(out, settings.size or layout.n_bytes, job.scratch_bytes(header), journal.held_bytes)
            fingerprint = job.fingerprint()
            journal.check(fingerprint)
        with full_precision(source, scratch) as file:
            fingerprint["source"] = check_weights(file, job.largest)
            if job.measurements:
                job.measurements.check_source(fingerprint["source"], source)
            if job.base:
                check_base(job, file)
                fingerprint["content of the base"] = [sha256(path) for path in shards(job.base.path)]
            journal.check(fingerprint)
            job = keep_exact(job, file)
            calibration = calibrate(job, file, scratch)
            if settings.mixes:
                job = mix(job, file, calibration)
            layout = job.layout(out)
            fingerprint["types"] = job.types_digest()
            output = Output(layout, journal, fingerprint)
            n_weights = {plan.name: plan.n_weights for plan in job.plans}
            done = sum(n_weights[name] for name in output.finished)
            total = sum(n_weights.values())
            with progress(desc="quantizing", total=total, initial=done, unit="weight", unit_scale=True) as bar:
                for name, (data, record) in quantized_tensors(job, file, calibration, output):
                    output.put(name, data, record)
                    bar.update(n_weights[name])
            output.finish()
    files = [shard.path for shard in layout.shards]
    return _report(job, files, journal.records, calibration, time.monotonic() - start)


def dry_run(source: Path, out: Path, settings: Settings) -> DryRun:
    """Plan what `convert` would write. For mixed precision that means to calibrate and to measure."""
    check_output(out, source)
    with temporary_folder("aaac-") as scratch:
        with full_precision(source, scratch, header_only=True) as header:
            job = prepare(source, header, settings)
        # All this depends on the weights.
        if settings.mixes or source.is_file() or may_be_exact(source):
            with full_precision(source, scratch) as file:
                job = keep_exact(job, file)
                if settings.mixes:
                    settings.check_device()
                    if job.measurements:
                        job.measurements.check_source(check_weights(file), source)
                    job = mix(job, file, calibrate(job, file, scratch))
    layout = job.layout(out)
    return DryRun(job.plans, layout.n_bytes, len(layout.shards))


def _report(
    job: Job, files: list[Path], records: dict[str, Record], calibration: Calibration, seconds: float
) -> Report:
    plans = {plan.name: plan for plan in job.plans}
    measured = calibration.measured
    planned = {name for name, p in plans.items() if measured and p.rounding == Rounding.FEEDBACK}
    tensors = [
        TensorReport(plans[name], Rounding(r.rounding), r.relative_error, r.weighted_error)
        for name, r in records.items()
        if r.relative_error is not None and r.weighted_error is not None
    ]
    # Synthetic moments allow for few tokens.
    n_tokens = job.calibration.n_tokens if job.moments == "measured" else math.inf
    return Report(
        files=files,
        tensors=tensors,
        coverage=coverage(job, calibration.imatrix),
        seconds=seconds,
        peak_bytes=peak_bytes(),
        damped=[
            name
            for name, r in records.items()
            if r.damping > DAMPING or (r.damping and n_tokens < plans[name].shape[-1])
        ],
        unmeasured={
            name: Rounding(r.rounding)
            for name, r in records.items()
            if name in planned and r.rounding != Rounding.FEEDBACK
        },
        not_moved=measured.places.without_rows if measured else [],
        exact={p.name: p.type for p in job.plans if p.rounding == Rounding.EXACT or p.type in BY_NATURE},
        left_out=checkpoint.left_out(job.source),
    )
