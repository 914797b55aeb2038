#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build, check, then time.
#
#   benchmarks/gpu.sh [OUT [WORK]]
#
# OUT (default benchmarks/results) gets tables, JSON and logs; WORK (default a temporary folder, removed afterwards) takes up to 60 GB of models.
# Needs the CUDA toolkit, git, a C++ compiler and Python 3.11; installs what the package needs, with CuPy, into .venv-gpu.
# PYTHON=... uses an environment that has all that instead, and then no network is needed if AAAC_CACHE holds llama.cpp's source.
#
# STAGES chooses from "build check kernels models", all by default: llama.cpp (without it nothing of llama.cpp is checked or timed), the tests, the
# times of the kernels, those of llama-bench. An earlier call's build stands, and a build or a making of models in WORK that was cut off goes on.
# The checks come first, and nothing is timed after one has failed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-benchmarks/results}" && cd "${1:-benchmarks/results}" && pwd)
has() { [[ " ${STAGES:-build check kernels models} " == *" $1 "* ]]; }

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi > "$out/gpu-device.txt"; then
    echo "no NVIDIA GPU: nvidia-smi is missing or fails" >&2
    exit 1
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv .venv-gpu
    python=.venv-gpu/bin/python
    cuda=$(nvidia-smi | sed -n 's/.*CUDA.*Version: *\([0-9]*\)\..*/\1/p' | head -n 1)
    "$python" -m pip install -q -c constraints.txt -e '.[test]' "cupy-cuda${cuda}x"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

bin=
if has build || has models; then
    bin=$("$python" -m aaac_gguf llama build --backend cuda --arch native | tail -n 1)
fi
if has check; then
    AAAC_CUDA_BIN=$bin "$python" -m pytest -q -ra -m gpu tests/inference/test_gpu.py 2>&1 | tee "$out/gpu-tests.txt"
fi
if has kernels; then
    "$python" benchmarks/gpu.py "$out"
fi
if has models; then
    work=${2:-$(mktemp -d)}
    if [ -z "${2:-}" ]; then
        trap 'rm -rf "$work"' EXIT
    fi
    "$python" benchmarks/gpu_models.py "$bin" "$out" "$work"
fi
