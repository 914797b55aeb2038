"""Turn the weights of every tensor into the output's data, as the plan says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..files.gguf import GgufFile, dequantize
from ..files.journal import Record
from ..files.output import Output
from ..models.weights import load_weight
from ..quantizer.exact import encode_exactly
from ..quantizer.moments import Moments
from ..quantizer.quantize import quantize
from ..quantizer.types import TENSOR_TYPES, Method, round_to_nearest
from .calibrate import Calibration
from .exact import DTYPES
from .job import Job
from .plan import Rounding, TensorPlan

TensorResult = tuple[Any, Record]  # the data of a tensor, and what is known of it


def quantized_tensors(
    job: Job, file: GgufFile, calibration: Calibration, output: Output
) -> Iterator[tuple[str, TensorResult]]:
    """Yield every tensor that `output` does not have yet, one at a time.

    Those that are kept from a finished file come first, since what they compute is known. Tensors with measured moments
    come in the order in which the model multiplies with them, since each is calibrated on what the quantized ones
    before it compute.
    """
    plans = {plan.name: plan for plan in job.plans}
    done = set(output.finished)
    for name, plan in plans.items():
        if plan.rounding == Rounding.KEPT and name not in done:
            done.add(name)
            yield name, encode(plan, job, file, calibration)
    measured = calibration.measured
    if measured and measured.looked_up:
        # First, so that all blocks are calibrated on its values.
        embeddings, moments = plans[measured.looked_up], measured.embedding_moments()
        if result := _encode_in_model(embeddings, job, file, calibration, output, moments):
            done.add(embeddings.name)
            yield embeddings.name, result
    for name in plans:
        if name in done:
            continue
        while measured and measured.pending(name):
            for ready, result in _decoder_block(job, file, calibration, output):
                done.add(ready)
                yield ready, result
        if name not in done:
            yield name, encode(plans[name], job, file, calibration)


def _decoder_block(
    job: Job, file: GgufFile, calibration: Calibration, output: Output
) -> Iterator[tuple[str, TensorResult]]:
    """Quantize the matrices of the next decoder block.

    What an interrupted run finished of it, or a finished file has of it, is read back.
    """
    measured = calibration.measured
    assert measured
    plans = {plan.name: plan for plan in job.plans}

    names = measured.tensors(measured.position)
    if all(name in output.finished for name in names):
        for name in names:
            _encode_in_model(plans[name], job, file, calibration, output, None)
        measured.advance()
        return
    if kept := [name for name in names if plans[name].rounding == Rounding.KEPT]:
        measured.record(measured.position)  # while the weights are those of the full model
        for name in kept:
            _encode_in_model(plans[name], job, file, calibration, output, None)
    for layer in measured.layers():
        for name, moments in layer.items():
            if result := _encode_in_model(plans[name], job, file, calibration, output, moments):
                yield name, result


def _encode_in_model(
    plan: TensorPlan, job: Job, file: GgufFile, calibration: Calibration, output: Output, moments: Moments | None
) -> TensorResult | None:
    """Encode a tensor, and give the model what it decodes to.

    One that an interrupted run or a finished file has is read back; then the result is None.
    """
    assert calibration.measured
    finished = plan.name in output.finished
    result = None if finished else encode(plan, job, file, calibration, moments)
    data, record = result or (output.read(plan.name), output.finished[plan.name])
    calibration.measured.replace(plan.name, torch.from_numpy(dequantize(data, plan.type, record.codec)))
    return result


def encode(
    plan: TensorPlan, job: Job, file: GgufFile, calibration: Calibration, measured: Moments | None = None
) -> TensorResult:
    """Return the data of one tensor, and its record.

    measured: its second moments of the model that runs.
    """
    if plan.rounding == Rounding.COPY:
        return file.tensors[plan.name].data, Record(plan.rounding, file.codecs.get(plan.name))
    if plan.rounding == Rounding.KEPT:
        assert job.base
        return job.base.tensors[plan.name].data, Record(plan.rounding, job.base.codecs.get(plan.name))
    if plan.rounding == Rounding.EXACT:
        exact = encode_exactly(load_weight(file, plan.name, "cpu"), DTYPES[plan.source_type], plan.type)
        assert exact, plan.name  # the plan says so
        file.release()
        return exact.data, Record(plan.rounding, exact.codec)
    weight = load_weight(file, plan.name, job.settings.device)
    file.release()  # most often `weight` is a copy
    moments = None
    rounding: Rounding = plan.rounding
    if rounding == Rounding.FEEDBACK:
        moments = measured or calibration.estimated_moments(plan.name)
        if not measured:
            rounding = Rounding.SYNTHETIC if moments else plan.without_moments
    if rounding == Rounding.NEAREST:
        return round_to_nearest(weight, plan.type), Record(rounding)
    settings = job.settings
    quantizer = TENSOR_TYPES[plan.type].quantizer
    method: Method = settings.method if quantizer and settings.method in quantizer.methods else "aaac"
    if moments:
        target = moments.target(weight)
        result = quantize(target, plan.type, None, moments.inputs, moments.outputs, method=method, seed=settings.seed)
    else:
        importance = calibration.importance(plan.name, weight)
        result = quantize(weight, plan.type, importance, method=method, seed=settings.seed)
    record = Record(rounding, result.codec, result.relative_error, result.weighted_error, result.damping)
    return result.data, record
