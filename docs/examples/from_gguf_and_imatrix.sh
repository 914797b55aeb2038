#!/usr/bin/env bash
# Make an AAAC file from a full-precision GGUF and llama.cpp's importance matrix. transformers runs no model.
#
#   from_gguf_and_imatrix.sh [FULL.gguf] [TEXT] [OUT_FOLDER]
#
# Needs `aaac-gguf llama build` once. The default is the model that ships with aaac-gguf, with the text that ships with it.
set -euo pipefail

bundled() { python -c "from aaac_gguf import resources; print(resources.$1)"; }
text=${2:-$(bundled SAMPLE_TEXT)}
out=${3:-.}

if [ $# -gt 0 ]; then
    full=$1
else
    # A GGUF in 16 bits. Most models on the Hugging Face Hub have one already.
    full=$out/full.gguf
    aaac-gguf convert "$(bundled MODEL)" -o "$full" --type F16
fi

# Importance: the mean square of every input channel over a text. A longer text than this one is better.
aaac-gguf llama run llama-imatrix -m "$full" -f "$text" -o "$out/imatrix.gguf" -c 256

# The importance, and correlations from a short text that passes through the weights. `--no-feedback` would be faster and less exact.
aaac-gguf convert "$full" --imatrix "$out/imatrix.gguf" -o "$out/model.gguf"

# Structure, the error of every tensor, and the logits.
aaac-gguf verify "$out/model.gguf" --source "$full" --imatrix "$out/imatrix.gguf"
