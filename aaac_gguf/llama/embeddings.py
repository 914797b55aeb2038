"""Compute embeddings with a GGUF file, by the built llama-server."""

from __future__ import annotations

import contextlib
import http
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AaacError
from . import tools
from .build import last_error

SECONDS_TO_LOAD = 600


def embeddings(model: Path, texts: Sequence[str], n_ctx: int, log: Path) -> tuple[list[list[int]], NDArray[np.float32]]:
    """Return the tokens of each text, at most n_ctx, as llama.cpp makes them, and the embeddings float32 [n, d].

    Raises AaacError if llama-server fails.
    """
    with _server(model, n_ctx, log) as ask:
        tokens = [ask("/tokenize", {"content": text, "add_special": True})["tokens"][:n_ctx] for text in texts]
        answer = ask("/v1/embeddings", {"input": tokens})["data"]
    return tokens, np.array([item["embedding"] for item in answer], np.float32)


@contextlib.contextmanager
def _server(model: Path, n_ctx: int, log: Path) -> Iterator[Any]:
    """Run llama-server, and give a function that asks it: a path and a JSON object, to its answer."""
    with socket.socket() as probe:  # a port that is free
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(n_ctx)
    command: list[str | Path] = [tools.tool("llama-server"), "-m", model, "--embeddings", "-np", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "-c", size, "-b", size, "-ub", size]

    def ask(path: str, content: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS_TO_LOAD)
        with contextlib.closing(connection):
            connection.request("GET" if content is None else "POST", path, json.dumps(content))
            response = connection.getresponse()
            answer = json.loads(response.read())
        if response.status != http.HTTPStatus.OK:
            raise AaacError(f"llama-server: {answer.get('error', {}).get('message', response.reason)} (see {log})")
        return answer

    with open(log, "wb") as f:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT)
    try:
        _wait(process, ask, log)
        yield ask
    except (OSError, http.client.HTTPException) as e:
        output = log.read_text("utf-8", "replace")
        raise AaacError(f"llama-server does not answer ({e}): {last_error(output)} (see {log})") from None
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], ask: Any, log: Path) -> None:
    """Wait until the server has loaded the model. Raises AaacError if it ends."""
    end = time.monotonic() + SECONDS_TO_LOAD
    while time.monotonic() < end:
        if process.poll() is not None:
            output = log.read_text("utf-8", "replace")
            raise AaacError(f"llama-server ended with status {process.returncode}: {last_error(output)} (see {log})")
        with contextlib.suppress(OSError, AaacError):  # it does not listen yet, or loads the model
            ask("/health")
            return
        time.sleep(0.1)
    raise AaacError(f"llama-server has not loaded the model in {SECONDS_TO_LOAD} s (see {log})")
