"""An AAAC file is served by llama-server, to an OpenAI client, and runs in llama-cpp-python."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from aaac_gguf import resources
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import tools
from aaac_gguf.reporting import demo

pytestmark = pytest.mark.llama
N_TOKENS = 24


@pytest.fixture(scope="module")
def aaac_file(patched, tmp_path_factory):
    out = tmp_path_factory.mktemp("served") / "demo.gguf"
    convert.convert(resources.MODEL, out, Settings(calibration="none"))
    return out


@pytest.fixture(scope="module")
def expected(aaac_file):
    """Return the beginning of llama-completion's greedy text. It prints a token less than it is asked for."""
    text = (
        demo.generate(aaac_file, demo.PROMPT, aaac_file.with_suffix(".log"), N_TOKENS).removeprefix(demo.PROMPT).strip()
    )
    assert len(text) > N_TOKENS
    return text


@pytest.fixture(scope="module")
def server(aaac_file):
    """Return the base address of a llama-server that has loaded the file."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = aaac_file.with_name("server.log")
    with open(log, "wb") as f:
        process = subprocess.Popen(
            [tools.tool("llama-server"), "-m", aaac_file, "--port", str(port), "-c", "512", "-t", "1"],
            stdout=f,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_completion_is_what_llama_completion_says(server, expected):
    body = {"model": "demo", "prompt": demo.PROMPT, "max_tokens": N_TOKENS, "temperature": 0}
    choice = post(f"{server}/v1/completions", body)["choices"][0]
    assert choice["text"].strip().startswith(expected)


def test_chat(server):
    """Ask through the openai package if it is installed, else by the same request by hand."""
    messages = [{"role": "user", "content": "Tell me about the old gentleman."}]
    if importlib.util.find_spec("openai"):
        import openai

        client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
        reply = client.chat.completions.create(model="demo", messages=messages, max_tokens=N_TOKENS).model_dump()
    else:
        reply = post(f"{server}/v1/chat/completions", {"model": "demo", "messages": messages, "max_tokens": N_TOKENS})
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["choices"][0]["message"]["content"].strip()
    assert 0 < reply["usage"]["completion_tokens"] <= N_TOKENS


def test_llama_cpp_python(aaac_file, expected, tmp_path):
    wheel = llama.find_wheel()
    if wheel is None:
        pytest.skip("the llama-cpp-python wheel is not built; run `aaac-gguf llama build --python`")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel, "diskcache"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install the wheel with diskcache: {done.stderr.strip().splitlines()[-1]}")
    code = f"""
import sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False)
print(llama_cpp.__version__)
print(model(sys.argv[2], max_tokens={N_TOKENS}, temperature=0)["choices"][0]["text"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, aaac_file, demo.PROMPT],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    version, _, text = run.stdout.partition("\n")
    assert version.endswith("+aaac")
    assert text.strip().startswith(expected)
