"""Run a job's calibration: the importance of every matrix, and second moments if error feedback asks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..calibration.activations import Activations, Squares, importance
from ..calibration.sequential import BlockMoments
from ..calibration.synthetic import SyntheticMoments, estimation_tokens
from ..calibration.tokens import self_tokens, with_random
from ..files.gguf import GgufFile
from ..files.imatrix import Imatrix
from ..models import checkpoint
from ..models.agreement import check_agreement
from ..models.blocks import Blocks
from ..models.finite import finite_logits
from ..quantizer.moments import Moments
from .coverage import check_coverage
from .job import Job


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of a calibration: what is known of the inputs of the model's matrices.

    imatrix    their importance, as far as it is known
    measured   second moments of a model that runs, quantized decoder block by decoder block
    synthetic  estimates second moments of what is not measured
    """

    imatrix: Imatrix
    measured: BlockMoments | None = None
    synthetic: Callable[[], SyntheticMoments] | None = None

    @cached_property
    def _estimated(self) -> SyntheticMoments | None:
        return self.synthetic() if self.synthetic else None

    def importance(self, name: str, weight: Tensor) -> Tensor | None:
        """Return the importance of the inputs of a tensor: float32 [K] or, for `weight` [E, N, K], [E, K].

        None if it is not known.
        """
        entry = self.imatrix.entries.get(name)
        if entry is None:
            return None
        importance = torch.from_numpy(entry.importance()).to(weight.device)
        # What is one matrix in the model, with one importance, may be cut into several here.
        return importance.expand(len(weight), -1) if importance.dim() < weight.dim() - 1 else importance

    def estimated_moments(self, name: str) -> Moments | None:
        """Return synthetic moments of a tensor; None if there are none. Ask in the order of the decoder blocks."""
        return self._estimated.moments(name) if self._estimated else None


def calibrate(job: Job, file: GgufFile, folder: Path, measurements: Path | None = None) -> Calibration:
    """Run the model over the calibration tokens if the job wants that; else take what an importance file says.

    A job with measurements has both from them, and only loads the model. folder: for temporary files, which take
    `Job.scratch_bytes`. measurements: a folder for activations and gradients, if they are to stay. Raises AaacError for
    a model that transformers cannot run.
    """
    given, settings, known = job.calibration, job.settings, job.measurements

    def done(imatrix: Imatrix) -> Calibration:
        check_coverage(job, imatrix)
        if job.moments == "none" or "token_embd.weight" not in file.tensors:
            return Calibration(imatrix)
        tokens = cache(lambda: estimation_tokens(job.source, file, settings.seed))
        return Calibration(imatrix, synthetic=lambda: SyntheticMoments(file, tokens(), imatrix, settings.device))

    if given.kind in ("none", "imatrix"):
        return done(given.imatrix or Imatrix({}))
    if known and job.moments != "measured":
        return done(known.importance)
    folder.mkdir(exist_ok=True)
    model = checkpoint.load_model(job.source, settings.device, folder)
    if known:
        sequences = known.sequences
        blocks = Blocks(model, sequences[:1])
        activations = Activations(blocks, sequences, known.n_text, known.folder, measured=True)
        moments = BlockMoments(
            activations, file, job.searched, known.folder, settings.seed, measured=True, replaced=job.replaced
        )
        return replace(done(known.importance), measured=moments)
    check_agreement(model, file, job.source)
    tokens = given.tokens
    if tokens is None:
        with finite_logits(model):
            tokens = self_tokens(model, settings.sequences, settings.sequence_length, settings.seed)
    dataset = settings.calibration or "bundled"
    if job.moments != "measured":
        return done(importance(model, tokens, file.architecture, file.tensors, dataset))
    n_vocab = min(len(file.get("tokenizer.ggml.tokens", [])), model.get_input_embeddings().num_embeddings)
    sequences = with_random(tokens, n_vocab, settings.seed)
    kept = measurements or folder
    activations = Activations(Blocks(model, tokens[:1]), sequences, len(tokens), kept)
    squares = Squares()
    activations.run(squares)
    imatrix = squares.imatrix(model, tokens, file.architecture, file.tensors, dataset)
    calibration = done(imatrix)
    moments = BlockMoments(activations, file, job.searched, kept, settings.seed, replaced=job.replaced)
    return replace(calibration, measured=moments)
