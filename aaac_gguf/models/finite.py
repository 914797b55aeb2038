"""Find the module of a model in which activations stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import AaacError


class _NotFinite(Exception):
    """Ends a forward pass. `str()` is the name of the module."""


def is_finite(logits: Tensor) -> bool:
    """Return whether every row [..., V] has a softmax. A logit of -inf, a token that never comes, does no harm."""
    return bool(logits.amax(-1).isfinite().all())


def not_finite(model: Any, run: Callable[[], Any]) -> AaacError:
    """Return the error that names the first module whose output is not finite when `run` runs the model again."""

    def look(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if not all(tensor.isfinite().all() for tensor in _floats(output)):
                raise _NotFinite(name)

        return hook

    # A module's hook runs after those of the modules in it, so the first one to find something is the innermost.
    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    where = "the logits are"
    try:
        with torch.no_grad():
            run()
    except _NotFinite as e:
        where = f"the output of {e} is"
    finally:
        for hook in hooks:
            hook.remove()
    dtype = str(model.dtype).removeprefix("torch.")
    return AaacError(
        f"`calibration`: {where} not finite in {dtype}: activations overflow, or a norm divides by zero; "
        "check the weights, the norms and rms_norm_eps of config.json, "
        "calibrate with `imatrix`, or set `calibration` to 'none'"
    )


@contextmanager
def finite_logits(model: Any) -> Iterator[None]:
    """Raise AaacError as soon as the model, run inside this context, gives logits that are not finite."""

    def check(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not is_finite(output.logits):
            hook.remove()
            raise not_finite(model, lambda: model(*args, **kwargs))

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _floats(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a module's output."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
