"""The direction of imports: none runs upwards, none in a circle, also not inside functions.

Imports under ``if TYPE_CHECKING`` do not count. Nor does it count that importing a module runs the ``__init__`` of its
package first.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The modules and folders of minisdxl, from the ground up. A module may import from its own floor and from those below.
FLOORS = (
    ("bundled", "config", "embedding", "seeds"),
    ("fast",),
    ("operators",),
    ("images", "tokenizer", "clip", "text", "transformer", "unet", "vae_decoder", "vae"),
    ("preconditioning",),
    ("sampler", "solvers", "samplings", "steps", "settings", "cost", "budget"),
    ("prompting",),
    ("runtime", "checkpoint", "diffusers", "inspector"),
    ("pipeline",),
    ("loading",),
    ("cli",),
    ("scale",),  # imports Ray, so only `--workers` imports it
    ("sample", "flops", "convert", "download", "inspect"),  # the commands
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules(root: Path, *packages: str) -> dict[str, Path]:
    return {module_name(path, root): path for name in packages for path in sorted((root / name).rglob("*.py"))}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All of a module, except what is under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """What a file imports: modules of ours by their full names, others by their package."""
    found = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path} has a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in full}
    return {name if name in modules else name.partition(".")[0] for name in found}


MODULES = find_modules(ROOT, "atedm", "minisdxl", "tools")
IMPORTS = {name: imports(path, MODULES) for name, path in MODULES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle in the order in which they import each other, the first one again at the end."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def package(name: str) -> str:
    return name.partition(".")[0]


def floor(name: str) -> int:
    """The floor of a module of minisdxl; the package itself is at the bottom, because all can import its version."""
    part = f"{name}.".split(".")[1]
    assert part == "" or part in FLOOR, f"{name} has no floor, expected minisdxl.{part} in FLOORS"
    return FLOOR.get(part, -1)


def test_atedm_is_the_ground_floor() -> None:
    allowed = {"torch", "einops", "triton", "atedm", *sys.stdlib_module_names}
    others = {f"{name} imports {other}" for name in IMPORTS if package(name) == "atedm" for other in IMPORTS[name]}
    assert {line for line in others if package(line.rpartition(" ")[2]) not in allowed} == set()


def test_no_package_imports_tools() -> None:
    users = [name for name in IMPORTS if package(name) != "tools" and "tools" in map(package, IMPORTS[name])]
    assert users == []


def test_no_command_of_tools_is_imported() -> None:
    """What several commands share lies in the folders of tools, which may be skipped."""
    commands = {name for name, path in MODULES.items() if path.parent == ROOT / "tools" and name != "tools"}
    assert len(commands) > 10
    assert [f"{name} imports {other}" for name in IMPORTS for other in IMPORTS[name] & commands] == []


def test_no_import_runs_upwards_in_minisdxl() -> None:
    ours = {name: {other for other in IMPORTS[name] if package(other) == "minisdxl"} for name in IMPORTS}
    upwards = [
        f"{name} imports {other}"
        for name, others in ours.items()
        if package(name) == "minisdxl"
        for other in others
        if floor(other) > floor(name)
    ]
    assert upwards == []


def test_no_import_runs_in_a_circle() -> None:
    graph = {name: {other for other in others if other in MODULES} for name, others in IMPORTS.items()}
    assert " -> ".join(circle(graph)) == ""


def test_a_circle_and_an_upward_import_are_found(tmp_path: Path) -> None:
    """The checks themselves, on files with an import inside a function and one that is for the type checker alone."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "cellar.py").write_text(
        "def dig():\n    from house.attic import roof\n    import numpy.linalg"
    )
    (tmp_path / "house" / "attic.py").write_text("if TYPE_CHECKING:\n    import house.sky\nfrom house import cellar")
    modules = find_modules(tmp_path, "house")
    found = {name: imports(path, modules) for name, path in modules.items()}
    assert found == {"house": set(), "house.cellar": {"house.attic", "numpy"}, "house.attic": {"house.cellar"}}
    assert set(circle(found)) == {"house.cellar", "house.attic"}
    assert circle(found | {"house.attic": set()}) == []
    assert floor("minisdxl.runtime.strips") < floor("minisdxl.pipeline") < floor("minisdxl.cli.runs")
    with pytest.raises(
        AssertionError, match=r"minisdxl\.garage\.door has no floor, expected minisdxl\.garage in FLOORS"
    ):
        floor("minisdxl.garage.door")
