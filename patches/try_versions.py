"""Try the patch on other llama-cpp-python source distributions and say which insertions find no place there.

    python patches/try_versions.py 0.3.35 0.3.34 ...

Prints a Markdown table, then every insertion that failed as FILE:LINE (of the pinned version): its first line. That an insertion finds its place
does not show that the result compiles: `aaac-gguf llama build --source` on the unpacked source does.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from aaac_gguf import resources
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import patch


def main() -> int:
    versions = sys.argv[1:]
    if not versions or versions[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    resources.cache_dir().mkdir(parents=True, exist_ok=True)
    pinned, n_hunks, rejects = patch.upstream().version, len(patch.hunks()), []
    print(
        f"{patch.summary()}; made for {pinned}\n\n| llama-cpp-python | insertions that fit | that do not |\n|---|---|---|"
    )
    for version in versions:
        with tempfile.TemporaryDirectory(prefix="aaac-versions-") as scratch:
            base, tree = (
                llama.unpack(llama.download(v), Path(scratch) / folder)
                for v, folder in ((pinned, "pinned"), (version, "tree"))
            )
            failed = patch.apply(tree, base)
        print(f"| {version} | {n_hunks - len(failed)} of {n_hunks} | {len(failed)} |", flush=True)
        rejects += [f"{version}  {hunk}" for hunk in failed]
    print("\n".join(["", *rejects]) if rejects else "")
    return 1 if rejects else 0


if __name__ == "__main__":
    sys.exit(main())
