"""Count what the Vulkan shader of a matrix-vector product does for a weight, beside upstream's for other 4-bit types.

    python benchmarks/vulkan.py

Needs glslc, spirv-opt and spirv-dis (on Debian and Ubuntu, `apt install glslc spirv-tools`), and no GPU. Counts are of
SPIR-V, before the driver's compiler. That one may merge loads and drop address arithmetic, so they compare shaders and
predict no time.

The shaders are specialised for two rows in a workgroup, and for one column or eight. What is counted is the body of
the innermost loop over the row. Each weight there takes part in one instruction of 4 products per column. A product of
floats counts as 4 instructions, because GPUs have none for it. q8_1 is the shader whose activations are 8-bit integers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from aaac_gguf.llama.build import fetch

UPSTREAM = {"FLOAT_TYPE": "float", "FLOAT_TYPEV2": "vec2", "B_TYPE": "float", "B_TYPEV2": "vec2", "B_TYPEV4": "vec4"}

AAAC4 = ("AAAC4_G16", "AAAC4_G32", "AAAC4_G128")

# name: (source, defines, specialization constants, columns)
SHADERS = {
    **{t: ("aaac_mul_mat_vec.comp", {f"DATA_A_{t}": "1"}, "0:64 1:1 2:2", 1) for t in AAAC4},
    **{
        t: ("mul_mat_vec.comp", {**UPSTREAM, "D_TYPE": "float", f"DATA_A_{t}": "1"}, "0:64 1:2 2:1", 1)
        for t in ("Q4_0", "IQ4_NL")
    },
    **{
        f"{t}, {activations}": ("aaac_mul_mat_vec.comp", {f"DATA_A_{t}": "1", **defines}, "0:64 1:8 2:2", 8)
        for t in AAAC4
        for activations, defines in (("f32", {}), ("q8_1", {"Q8_1": "1"}))
    },
}

PRODUCTS = {"OpDot", "OpSDot", "OpSDotKHR"}  # of 4 weights and 4 activations

# Instructions that only describe the flow of control or a place in memory.
NO_WORK = {"OpLabel", "OpPhi", "OpBranch", "OpBranchConditional", "OpLoopMerge", "OpSelectionMerge", "OpAccessChain"}
WEIGHTS, ACTIVATIONS = "0", "1"  # the bindings of both


def assembly(source: Path, defines: dict[str, str], constants: str) -> list[str]:
    """Return the lines of a shader's SPIR-V, optimised, with its specialization constants set."""
    with tempfile.TemporaryDirectory() as folder:
        spv, specialized = Path(folder) / "a.spv", Path(folder) / "b.spv"
        options = [f"-D{name}={value}" for name, value in defines.items()]
        compiler = ["glslc", "-fshader-stage=compute", "--target-env=vulkan1.2", "-O"]
        subprocess.run([*compiler, *options, source, "-o", spv], check=True)
        constant = [f"--set-spec-const-default-value={constants}", "--freeze-spec-const"]
        passes = [*constant, "--fold-spec-const-op-composite", "-O", "--loop-unroll", "-O"]
        subprocess.run(["spirv-opt", *passes, spv, "-o", specialized], check=True)
        command = ["spirv-dis", "--no-color", "--no-indent", specialized]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def opcode(line: str) -> str:
    """Return the name of a line's instruction."""
    return line.split(" = ", 1)[-1].split()[0]


def loop_body(lines: list[str]) -> list[str]:
    """Return the loop that has most products of all loops without another in them."""
    bodies = []
    for start, line in enumerate(lines):
        if "OpLoopMerge" in line:
            end = lines.index(f"{line.split()[1]} = OpLabel")
            body = lines[start + 1 : end]
            if not any("OpLoopMerge" in inner for inner in body):
                bodies.append(body)
    return max(bodies, key=lambda body: sum(opcode(line) in PRODUCTS for line in body))


def count(lines: list[str], n_columns: int) -> Counter[str]:
    """Return what the loop does in all: weights, bytes of each kind of memory, loads and other instructions."""
    text = "\n".join(lines)
    binding = dict(re.findall(r"OpDecorate (%\w+) Binding (\d)", text))
    shared = set(re.findall(r"(%\w+) = OpVariable %\w+ Workgroup", text))
    base = dict(re.findall(r"(%\w+) = OpAccessChain %\w+ (%\w+)", text))
    bits = {name: int(width) for name, width in re.findall(r"(%\w+) = OpType(?:Int|Float) (\d+)", text)}
    for name, part, n in re.findall(r"(%\w+) = OpTypeVector (%\w+) (\d)", text):
        bits[name] = bits[part] * int(n)
    total: Counter[str] = Counter()
    for line in loop_body(lines):
        if opcode(line) in PRODUCTS:
            total["products"] += 1
        if opcode(line) == "OpLoad":
            kind, pointer = re.findall(r"%\w+", line)[1:3]
            variable = base.get(pointer, pointer)
            if variable in shared:
                total["shared loads"] += 1
            elif variable in binding:
                total["loads"] += 1
                total["weight bytes" if binding[variable] == WEIGHTS else "activation bytes"] += bits[kind] // 8
            else:
                total["other"] += 1  # push constants
        elif opcode(line) not in NO_WORK:
            total["other"] += 4 if opcode(line) == "OpDot" else 1
    total["weights"] = 4 * total["products"] // n_columns
    return total


def main() -> None:
    """Print a table of what each shader does per weight."""
    if missing := [name for name in ("glslc", "spirv-opt", "spirv-dis") if not shutil.which(name)]:
        sys.exit(f"{', '.join(missing)} not found; on Debian and Ubuntu, `apt install glslc spirv-tools`")
    folder = fetch() / "ggml/src/ggml-vulkan/vulkan-shaders"
    columns = ("weight bytes", "activation bytes", "loads", "shared loads", "other")
    print("| shader | columns | weights in the loop | " + " | ".join(f"{name} per weight" for name in columns) + " |")
    print("|---" * (len(columns) + 3) + "|")
    for name, (source, defines, constants, n_columns) in SHADERS.items():
        total = count(assembly(folder / source, defines, constants), n_columns)
        cells = [f"{total[column] / total['weights']:.2f}" for column in columns]
        print(f"| {name} | {n_columns} | {total['weights']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
