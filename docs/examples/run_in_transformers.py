"""Run an AAAC GGUF in transformers and let it write.

    python run_in_transformers.py [MODEL.gguf] [--prompt TEXT] [--tokens N]

The default is the model that ships with aaac-gguf, which is quantized first.
"""

import argparse
from pathlib import Path

import aaac_gguf as aaac
from aaac_gguf.inference.torch import load_model, load_tokenizer
from aaac_gguf.resources import MODEL

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", type=Path)
parser.add_argument("--prompt", default="The old gentleman looked at her and said,")
parser.add_argument("--tokens", type=int, default=32)
args = parser.parse_args()

path = args.model
if path is None:
    path = Path("model.gguf")
    aaac.quantize(MODEL, path, calibration="none")

# The linear layers of this model hold their weights in blocks of 4 bits. On a GPU: load_model(path, device="cuda").
model, tokenizer = load_model(path), load_tokenizer(path)
tokens = tokenizer(args.prompt, return_tensors="pt")
written = model.generate(**tokens, max_new_tokens=args.tokens, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
