"""Run a job's calibration: the importance of every matrix, and second moments if error feedback asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..calibration.activations import Activations, Squares, importance
from ..calibration.sequential import BlockMoments
from ..calibration.synthetic import SyntheticMoments
from ..calibration.tokens import self_tokens, with_random
from ..files.gguf import GgufFile
from ..files.imatrix import Imatrix
from ..models import checkpoint
from ..models.blocks import Blocks
from .job import Job


@dataclass(frozen=True, eq=False)
class Calibration:
    """The result of a calibration: what is known of the inputs of the model's matrices.

    imatrix    their importance, as far as it is known
    measured   second moments of a model that runs, quantized decoder block by decoder block
    synthetic  second moments from the weights and the importance
    """

    imatrix: Imatrix
    measured: BlockMoments | None = None
    synthetic: SyntheticMoments | None = None


def calibrate(job: Job, file: GgufFile, folder: Path) -> Calibration:
    """Run the model over the calibration tokens if the job wants that; else take what an importance file says.

    folder: for activations and gradients, which take `Job.scratch_bytes`. Raises AaacError for a model that
    transformers cannot run.
    """
    given, settings = job.calibration, job.settings
    if given.kind in ("none", "imatrix"):
        imatrix = given.imatrix or Imatrix({})
        if job.moments == "synthetic" and "token_embd.weight" in file.tensors:
            synthetic = SyntheticMoments(file, imatrix, settings.device, settings.seed)
            return Calibration(imatrix, synthetic=synthetic)
        return Calibration(imatrix)
    folder.mkdir(exist_ok=True)
    model = checkpoint.load_model(job.source, settings.device, exact=False, folder=folder)
    tokens = given.tokens
    if tokens is None:
        tokens = self_tokens(model, settings.sequences, settings.sequence_length, settings.seed)
    dataset = str(settings.calibration or "self")
    if job.moments != "measured":
        return Calibration(importance(model, tokens, file.architecture, file.tensors, dataset))
    n_vocab = min(len(file.get("tokenizer.ggml.tokens", [])), model.get_input_embeddings().num_embeddings)
    sequences, weights = with_random(tokens, n_vocab, settings.seed)
    activations = Activations(Blocks(model, tokens[:1]), sequences, len(tokens), folder)
    squares = Squares()
    activations.run(squares)
    imatrix = squares.imatrix(model, tokens, file.architecture, file.tensors, dataset)
    return Calibration(imatrix, BlockMoments(activations, weights, file, job.searched, folder, settings.seed))
