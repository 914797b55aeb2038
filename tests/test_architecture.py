"""The direction of imports between the packages: nothing imports what is above it, and no two modules each other."""

import ast
from pathlib import Path

import pytest

import aaac_gguf

ROOT = Path(aaac_gguf.__file__).parent

# From the top down. What stands in one line does not import each other.
LEVELS = (
    {"__main__"},
    {"cli"},
    {""},  # the package itself: the Python API
    {"reporting"},
    {"conversion"},
    {"calibration"},
    {"quantizer"},
    {"inference"},
    {"models"},
    {"llama"},
    {"files"},
    {"compiler"},
    {"progress", "resources"},
    {"errors"},
)


def module_of(path: Path) -> str:
    """Return a module's name below the package, "files.gguf" for one."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py")) if path.name != "_hf_header.py"}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Return the modules of the package that a source imports anywhere, in functions and for types too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inside = f"{target}.{alias.name}".strip(".")
            found.add(inside if inside in MODULES else target)
    return found


GRAPH = {name: imports(path.read_text(), name, path.name == "__init__.py") - {name} for name, path in MODULES.items()}


def level(module: str) -> int:
    top = module.split(".")[0]
    return next(i for i, names in enumerate(LEVELS) if top in names)


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports of a package from one that is not below it. The package itself has `__version__` for all."""
    return [
        f"{a} -> {b or 'aaac_gguf'}"
        for a, targets in graph.items()
        for b in targets
        if a.split(".")[0] != b.split(".")[0] and level(b) <= level(a) and b != ""
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one circle of imports, none if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(graph.get(module, ())):
            if found := visit(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def test_every_module_has_a_level():
    for module in MODULES:
        level(module)


def test_imports_point_down():
    assert arrows_up(GRAPH) == []


def test_no_circles():
    # The package itself imports everything for its functions, and modules import its `__version__`.
    assert circle({module: targets - {""} for module, targets in GRAPH.items() if module}) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..files import gguf", {"files.gguf"}),
        ("from .job import Job", {"conversion.job"}),
        ("def f():\n    from ..files.gguf import read", {"files.gguf"}),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..reporting import page", {"reporting.page"}),
        ("from .. import __version__", {""}),
        ("import gguf", set()),
    ],
)
def test_an_import_is_seen(source, expected):
    assert imports(source, "conversion.plan") == expected


def test_a_wrong_arrow_and_a_circle_are_found():
    assert arrows_up({"files.gguf": {"models.source"}, "models.source": {"files.gguf"}}) == [
        "files.gguf -> models.source"
    ]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
