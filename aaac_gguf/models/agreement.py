"""Make sure that transformers and llama.cpp run the same model.

transformers reads a few settings of a GGUF and drops all others without a word, so it may run another model. What it
drops is set where that is simple, or refused. llama.cpp's converter, too, may not know a setting of a folder's config.
If llama.cpp is built, the logits of both are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import AaacError, warn
from ..files.gguf import GgufFile
from ..files.scratch import temporary_folder
from ..llama import build, evaluate
from ..resources import SAMPLE_TEXT

# Settings of an architecture that llama.cpp honours, and the value with which they change nothing.
_NEUTRAL: dict[str, Any] = {
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_beta_fast": 32,
    "rope.scaling.yarn_beta_slow": 1,
    "rope.scaling.yarn_log_multiplier": 0,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.temperature_length": 0,
    "logit_scale": 0,
    "residual_scale": 0,
    "embedding_scale": 0,
}
# Settings that some architectures of transformers have too, by the same name.
_SAME_NAMES = ("attn_logit_softcapping", "final_logit_softcapping")

# Both compute in 16 bits or more. The same model differs by less, and one with other positions by far more.
_MAX_KLD = 0.05

N_CTX = 512


def complete_config(config: Any, file: GgufFile) -> None:
    """Give transformers' config of a GGUF what it lacks of the scaling of positions.

    Raises AaacError for settings that llama.cpp honours and transformers does not.
    """
    kind, factor = file.setting("rope.scaling.type", "none"), float(file.setting("rope.scaling.factor", 1) or 1)
    dropped = [
        key
        for key, neutral in _NEUTRAL.items()
        if (value := file.setting(key)) is not None and not np.isclose(value, neutral)
    ]
    if kind == "none" and (scale := file.setting("rope.scale_linear")):
        kind, factor = "linear", float(scale)  # of older writers
    if kind not in ("none", "linear", "yarn") or (kind != "none" and not hasattr(config, "rope_parameters")):
        dropped.append("rope.scaling.type")
    dropped += [
        key for key in _SAME_NAMES if (value := file.setting(key)) and value != (getattr(config, key, None) or 0)
    ]
    window = file.setting("attention.sliding_window")
    if isinstance(window, int) and 0 < window < N_CTX and window != getattr(config, "sliding_window", None):
        dropped.append("attention.sliding_window")  # a wider one changes nothing in sequences of the usual length
    dropped += [name for name in file.tensors if name.startswith("rope_factors")]
    if dropped:
        raise AaacError(
            f"{file.path}: llama.cpp honours {', '.join(dropped)}, and transformers would run a model without it; "
            "calibrate with `imatrix`, or give the Hugging Face folder"
        )
    if kind != "none" and factor != 1:
        original = int(file.setting("rope.scaling.original_context_length", config.max_position_embeddings))
        config.rope_parameters |= {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": original,
        }


def scale_positions(model: Any, file: GgufFile) -> None:
    """Divide the frequencies of a model by the factors that a GGUF holds as a tensor, as Llama 3.1's does."""
    if "rope_freqs.weight" not in file.tensors:
        return
    factors = torch.from_numpy(file["rope_freqs.weight"].copy())
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor) and frequencies.shape == factors.shape:
                frequencies /= factors.to(frequencies)


def check_agreement(model: Any, file: GgufFile, source: Path) -> None:
    """Compare a model's logits with llama.cpp's on the first tokens of a sample text, if llama.cpp is built.

    file: what llama.cpp runs; source: what the model was loaded from, that file or the folder that it was made of. If
    they are two models, raises AaacError for a file, and warns for a folder.
    """
    if not any(build.is_built(backend) for backend in build.BACKEND_FLAGS):
        return
    with temporary_folder("aaac-agreement-") as folder:
        try:
            evaluate.save_logits(file.path, SAMPLE_TEXT, folder / "logits", file.positions(N_CTX), n_chunks=1)
        except AaacError as e:
            if source.is_file():
                raise
            warn(f"{source}: llama.cpp does not run it, before anything is quantized: {e}")
            return
        logits = evaluate.read_logits(folder / "logits")
        tokens = torch.from_numpy(evaluate.with_bos(logits.tokens, file)).long()
        with torch.inference_mode():
            found = model(input_ids=tokens[:1].to(model.device), use_cache=False).logits[0, logits.first : -1]
        base = found[:, : logits.n_vocab].float().log_softmax(-1).cpu().numpy()
        kld = float(evaluate.kl_divergence(base, logits.log_probabilities(0))[0].mean())
    if kld <= _MAX_KLD:
        return
    if source.is_file():
        raise AaacError(
            f"{file.path}: transformers runs another model than llama.cpp, {kld:.2g} nats away on a sample text, since "
            "it does not read all settings of a GGUF; calibrate with `imatrix`, or give the Hugging Face folder"
        )
    warn(
        f"{source}: llama.cpp runs another model than transformers, {kld:.2g} nats away on a sample text before "
        "anything is quantized; its converter may lack a setting of config.json, and the output is as far away"
    )
