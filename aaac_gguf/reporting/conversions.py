"""Print a conversion as text: its plan before, its report after."""

from __future__ import annotations

from collections.abc import Sequence

from ..conversion.convert import DryRun, Report
from ..conversion.coverage import in_short
from ..conversion.measure import MeasureReport
from ..conversion.plan import TensorPlan
from ..files.imatrix import Coverage
from .tables import shape_text, table


def plan_text(planned: DryRun) -> str:
    """Return the table of the tensors, with their types, how they are rounded and why, then the sums by type."""
    header = ("tensor", "shape", "from", "to", "rounding", "bytes", "why")
    rows = [
        (p.name, shape_text(p.shape), p.source_type.name, p.type.name, p.rounding.value, f"{p.n_bytes:,}", p.reason)
        for p in planned.plans
    ]
    files = "file" if planned.n_files == 1 else f"{planned.n_files} files"
    total = f"{files:>10} {'':13} {planned.n_bytes:15,} bytes"
    return f"{table(header, rows)}\n\n{_sums(planned.plans)}\n{total}"


def _sums(plans: Sequence[TensorPlan]) -> str:
    """Return a line for each type, with its number of tensors and bytes, and a line for all with bits per weight."""
    lines = []
    for ggml_type in dict.fromkeys(p.type for p in plans):
        group = [p for p in plans if p.type == ggml_type]
        n_bytes = sum(p.n_bytes for p in group)
        lines.append(f"{ggml_type.name:>10} {len(group):5} tensors {n_bytes:15,} bytes")
    n_bytes, n_weights = sum(p.n_bytes for p in plans), sum(p.n_weights for p in plans)
    bits = f"{8 * n_bytes / n_weights:.3f} bits per weight"
    return "\n".join([*lines, f"{'all':>10} {len(plans):5} tensors {n_bytes:15,} bytes  {bits}"])


def convert_text(report: Report) -> str:
    """Return size, time, memory and errors of a finished conversion, and what a user should know of its calibration."""
    files = f" (the first of {len(report.files)} files)" if len(report.files) > 1 else ""
    peak = f"peak memory {report.peak_bytes / 2**30:.2f} GiB"
    lines = [f"wrote {report.files[0]}{files}: {report.n_bytes:,} bytes in {report.seconds:.1f} s, {peak}"]
    if report.tensors:
        n_weights = [t.plan.n_weights for t in report.tensors]
        for error in ("relative_error", "weighted_error"):
            mean = sum(n * getattr(t, error) for n, t in zip(n_weights, report.tensors, strict=True)) / sum(n_weights)
            worst = max(report.tensors, key=lambda t: getattr(t, error))
            name = error.replace("_", " ")
            lines.append(f"{name}: mean {mean:.5f}, worst {getattr(worst, error):.5f} in {worst.plan.name}")
    for ggml_type in dict.fromkeys(report.exact.values()):
        names = in_short(name for name, t in report.exact.items() if t == ggml_type)
        lines.append(f"4-bit by nature, stored without loss as {ggml_type.name}: {names}")
    lines += _not_reached(report.coverage)
    for rounding in dict.fromkeys(report.unmeasured.values()):
        names = in_short(name for name, how in report.unmeasured.items() if how == rounding)
        lines.append(f"no measured moments, rounded by {rounding.value}: {names}")
    if report.not_moved:
        lines.append(
            f"not found in the model that calibration ran: {in_short(report.not_moved)}; "
            "matrices after them saw their full-precision weights"
        )
    if report.damped:
        channels = f"too few for the channels of {', '.join(report.damped)}, damped more than usual"
        lines.append(f"calibrate on more tokens: {channels}")
    if report.left_out:
        lines.append(report.left_out)
    return "\n".join(lines)


def measure_text(report: MeasureReport) -> str:
    """Return size, time and memory of a measurement, and what of the model it did not reach."""
    peak = f"peak memory {report.peak_bytes / 2**30:.2f} GiB"
    wrote = f"wrote {report.folder}: {report.n_bytes:,} bytes in {report.seconds:.1f} s, {peak}"
    return "\n".join([wrote, *_not_reached(report.coverage)])


def _not_reached(coverage: Coverage | None) -> list[str]:
    if not coverage or not coverage.missed:
        return []
    share = f"calibration reached {100 * coverage.share:.2f} % of the weights"
    return [f"{share}; not reached: {', '.join(coverage.missed)}"]
