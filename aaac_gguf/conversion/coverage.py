"""Say what calibration reached of the matrices that it is for, and warn if that is too little."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gguf import GGMLQuantizationType as T

from ..errors import AaacError, warn
from ..files.imatrix import Coverage, Imatrix
from .job import Job

# Below this share of the searched weights, a conversion is not what its settings promise.
ENOUGH = 0.95


def coverage(job: Job, imatrix: Imatrix) -> Coverage | None:
    """Return what an importance matrix covers of the weights that are rounded by search; None without calibration.

    At 8 bits it makes no difference worth a word. Embeddings are looked up, not multiplied with, unless they are the
    output matrix too.
    """
    if job.calibration.kind == "none":
        return None
    names = {p.name for p in job.plans}
    looked_up = {"per_layer_token_embd.weight"} | ({"token_embd.weight"} if "output.weight" in names else set())
    wanted = set(job.searched) - looked_up
    return imatrix.coverage({p.name: p.n_weights for p in job.plans if p.name in wanted and p.type != T.Q8_0})


def check_coverage(job: Job, imatrix: Imatrix) -> None:
    """Warn of a coverage below ENOUGH, with the tensors that were missed. With `strict`, raise AaacError instead."""
    reached = coverage(job, imatrix)
    if reached is None or reached.share >= ENOUGH:
        return
    message = (
        f"{job.source}: calibration reached {100 * reached.share:.2f} % of the weights that it is for; "
        f"not reached: {in_short(reached.missed)}"
    )
    if job.settings.strict:
        raise AaacError(f"{message}; calibrate on more tokens, or leave out `strict`")
    warn(f"{message}; these are rounded by what their weights tell. Calibrate on more tokens if they are experts")


def in_short(names: Iterable[str]) -> str:
    """Return a list of tensors in which those of several decoder blocks are one: "blk.*.attn_k.weight (4 of them)".

    Names in brackets after a tensor, its experts, are dropped if there is more than one.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"^blk\.\d+\.", "blk.*.", name.split(" ")[0]), []).append(name)
    return ", ".join(
        group[0] if len(group) == 1 else f"{pattern} ({len(group)} of them)" for pattern, group in groups.items()
    )
