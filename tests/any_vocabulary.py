"""Run llama.cpp's convert_hf_to_gguf.py for a model whose tokenizer it does not know, as if it were Llama 3's.

    python any_vocabulary.py header|whole PATH/convert_hf_to_gguf.py ARGUMENTS ...

So tiny models of all families can have the bundled model's tokenizer.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    what = sys.argv[1]
    del sys.argv[:2]
    folder = Path(sys.argv[0]).parent
    sys.path[0:1] = [str(folder), str(folder / "gguf-py")]
    import conversion.base

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
    if what == "header":
        import gguf

        from aaac_gguf.llama._hf_header import write_hole

        gguf.GGUFWriter.write_tensors_to_file = write_hole
    runpy.run_path(sys.argv[0], run_name="__main__")
