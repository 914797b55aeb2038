"""Try the patch on other source distributions of llama-cpp-python, and say which insertions find no place there.

    python patches/try_versions.py 0.3.35 0.3.34 ...

Print a Markdown table, and then every insertion that failed as `FILE:LINE: its first line`, where LINE is that of the
pinned version. An insertion that finds its place may still not compile there. `aaac-gguf llama build --source` on the
unpacked source shows this.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from aaac_gguf import resources
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import patch


def main() -> int:
    """Try every version that is named. Returns the exit status: 1 if an insertion failed."""
    versions = sys.argv[1:]
    if not versions or versions[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    resources.cache_dir().mkdir(parents=True, exist_ok=True)
    pinned, n_hunks, rejects = patch.upstream().version, len(patch.hunks()), []
    print(f"{patch.summary()}; made for {pinned}\n")
    print("| llama-cpp-python | insertions that fit | that do not |\n|---|---|---|")
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
