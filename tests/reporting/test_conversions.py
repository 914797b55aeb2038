"""Print what `convert` prints: the plan of a dry run, and the report."""

from pathlib import Path

from gguf import GGMLQuantizationType as T

from aaac_gguf.conversion.convert import DryRun, Report, TensorReport
from aaac_gguf.conversion.plan import Rounding, TensorPlan
from aaac_gguf.files.imatrix import Coverage
from aaac_gguf.reporting import conversions

PLANS = (
    TensorPlan("a.weight", (64, 256), T.BF16, T["AAAC4_G16"], Rounding.FEEDBACK, ""),
    TensorPlan("b.weight", (2, 64, 256), T.BF16, T.Q8_0, Rounding.NEAREST, "asked for: b"),
)


def test_a_plan_says_how_each_tensor_is_rounded_and_why():
    lines = conversions.plan_text(DryRun(PLANS, 60_000, 2)).splitlines()
    assert lines[0].split() == ["tensor", "shape", "from", "to", "rounding", "bytes", "why"]
    assert lines[2].split() == ["a.weight", "64", "x", "256", "BF16", "AAAC4_G16", "feedback", f"{PLANS[0].n_bytes:,}"]
    assert "2 x 64 x 256" in lines[3]
    assert "nearest" in lines[3]
    assert lines[3].endswith("asked for: b")
    n_bytes = sum(p.n_bytes for p in PLANS)
    assert lines[-2].split() == [
        "all",
        "2",
        "tensors",
        f"{n_bytes:,}",
        "bytes",
        f"{8 * n_bytes / 49152:.3f}",
        "bits",
        "per",
        "weight",
    ]
    assert lines[-1].split() == ["2", "files", "60,000", "bytes"]


def test_a_report_weights_errors_by_size_and_names_what_calibration_missed(tmp_path):
    files = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in files:
        path.write_bytes(bytes(1000))
    tensors = [TensorReport(p, p.rounding, e, 2 * e) for p, e in zip(PLANS, (0.03, 0.006), strict=True)]
    report = Report(files, tensors, Coverage(0.75, ["b.weight (experts 1)"]), 12.0, 3 * 2**29, ["a.weight"], "left out")
    assert conversions.convert_text(report).splitlines() == [
        f"wrote {files[0]} (the first of 2 files): 2,000 bytes in 12.0 s, peak memory 1.50 GiB",
        "relative error: mean 0.01400, worst 0.03000 in a.weight",
        "weighted error: mean 0.02800, worst 0.06000 in a.weight",
        "calibration reached 75.00 % of the weights; not reached: b.weight (experts 1)",
        "calibrate on more tokens: too few for the channels of a.weight, damped more than usual",
        "left out",
    ]


def test_a_report_without_calibration_is_one_line(tmp_path):
    path = Path(tmp_path / "a.gguf")
    path.write_bytes(b"")
    assert len(conversions.convert_text(Report([path], [], None, 1.0, 0, [])).splitlines()) == 1
