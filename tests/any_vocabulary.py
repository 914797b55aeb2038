"""Run llama.cpp's convert_hf_to_gguf.py for models whose tokenizers it does not know, as if they were Llama 3's.

    python any_vocabulary.py PATH/convert_hf_to_gguf.py

So tiny models of all families can have the bundled model's tokenizer. Each line of standard input is one conversion: a
JSON list of a file for what is printed, and the converter's arguments. Its exit status is printed. Imports take most of
a conversion's time, so they are done once, and each conversion is a fork.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def convert(program: str, log: str, *arguments: str) -> None:
    """Convert one model, and end this process."""
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    program = sys.argv[1]
    folder = Path(program).parent
    sys.path[0:1] = [str(folder), str(folder / "gguf-py")]
    import conversion
    import conversion.base
    import conversion.glm
    import conversion.hunyuan
    import torch
    import transformers

    from aaac_gguf import resources

    # Both import what they need on first use.
    transformers.AutoTokenizer.from_pretrained(resources.MODEL)
    torch.stack([torch.empty(1, device="meta")])
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
    for model in (conversion.glm.Glm4Model, conversion.glm.Glm4MoeModel, conversion.hunyuan.HunYuanMoEModel):
        model.set_vocab = conversion.base.TextModel._set_vocab_gpt2  # theirs look for tokens of their own
    for line in sys.stdin:
        if not (pid := os.fork()):
            convert(program, *json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
