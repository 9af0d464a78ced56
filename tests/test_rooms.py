"""The map of `src/`: arrows between rooms run down only, nothing goes in a circle, files stay short enough to read.

A room is a folder or a file right under `src/reelbatch`. Imports within functions count like any other: they hide a
circle, they do not end it. Those under `if TYPE_CHECKING` are counted apart.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import reelbatch

PACKAGE = Path(__file__).parents[1] / "src" / "reelbatch"

LEVELS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli", "serve", "cluster"),
    ("doctor",),
    ("tune",),
    ("demo",),
    ("train",),
    ("jobs", "repairs"),
    ("engine",),
    ("loading",),
    ("memory",),
    ("models",),
    ("attention",),
    ("ragged", "video", "geometry"),
    ("request", "formats"),
    ("device", "versions", "tracing", "files", "image", "outside_json"),
    ("wording",),
)
"""Rooms from the top down. A room may import from itself and from rooms of lower levels. `reelbatch` itself, whose
names are those of users, is imported by no room, its version aside."""

MOST_LINES = 400
MOST_ENGINE_LINES = 200
FAMILY_ROOMS = ("models/hunyuan_video", "models/hunyuan_video15", "loading", "demo", "repairs")
"""Rooms that may name what one family of models has."""
FAMILY_NAMES = {
    "a text encoder": re.compile(r"(?i:llama|qwen|byt5)|\bCLIP|\btext\w*\.clip\b|\bclip_(text|tokenizer|model)"),
    "a scale of guidance": re.compile(r"guidance\w*\s*\*\s*1_?000"),
    "a token count": re.compile(r"(?i)(?=.*token).*(?<![\w.])(95|256)(?![\w.%])"),
}


class Import(NamedTuple):
    """One import statement's target. when: "load", "call" (within a function) or "types" (under TYPE_CHECKING)."""

    source: str
    target: str
    when: str
    line: int


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below `reelbatch`; the package itself is ""."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def _targets(node: ast.Import | ast.ImportFrom, package: tuple[str, ...]) -> Iterator[str]:
    """Modules of this package that a statement loads, its parent packages aside."""
    if isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("reelbatch").lstrip(".") for alias in node.names if _own(alias.name))
        return
    if node.level:
        base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    elif node.module and _own(node.module):
        base = node.module.removeprefix("reelbatch").lstrip(".")
    else:
        return
    for alias in node.names:
        if alias.name == "__version__":
            continue
        inner = f"{base}.{alias.name}".lstrip(".")
        yield inner if inner in modules() else base


def _own(name: str) -> bool:
    return name == "reelbatch" or name.startswith("reelbatch.")


def _is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and not isinstance(node.test, ast.UnaryOp)
    )


def _imports_of(name: str, path: Path) -> Iterator[Import]:
    parts = tuple(name.split(".")) if name else ()
    package = parts if path.name == "__init__.py" else parts[:-1]

    def visit(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target in _targets(child, package):
                    if target != name:
                        yield Import(name, target, when, child.lineno)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from visit(child, "types" if when == "types" else "call")
            elif _is_type_checking(child):
                yield from (found for part in child.body for found in visit(ast.Module([part], []), "types"))
                yield from (found for part in child.orelse for found in visit(ast.Module([part], []), when))
            else:
                yield from visit(child, when)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "load")


@cache
def imports() -> tuple[Import, ...]:
    return tuple(found for name, path in modules().items() for found in _imports_of(name, path))


def room(module: str) -> str:
    return module.partition(".")[0]


def level(name: str) -> int:
    return next(number for number, rooms in enumerate(LEVELS) if name in rooms)


def circles(*whens: str) -> list[str]:
    """The circles of a graph of imports, one after the other: each is shown, and its last arrow then left out."""
    arrows = {(found.source, found.target): found for found in imports() if found.when in whens and found.source}
    shown = []
    while True:
        graph: dict[str, set[str]] = {}
        for source, target in arrows:
            graph.setdefault(source, set()).add(target)
        try:
            graphlib.TopologicalSorter(graph).prepare()
            return shown
        except graphlib.CycleError as error:
            circle = error.args[1]
            if (circle[0], circle[1]) not in arrows:
                circle = circle[::-1]
            steps = [arrows[pair] for pair in itertools.pairwise(circle)]
            path = [f"{step.source} (line {step.line}, {step.when})" for step in steps]
            shown.append(" → ".join([*path, circle[-1]]))
            last = steps[-1]
            del arrows[last.source, last.target]


@cache
def code_lines() -> tuple[tuple[str, int, str], ...]:
    """File, line number and text of every line of code, without comments and docstrings."""
    lines = []
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        prose = set()
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                prose.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for number, line in enumerate(text.splitlines(), 1):
            if number not in prose:
                lines.append((str(path.relative_to(PACKAGE)), number, re.sub(r"\s#.*", "", line)))
    return tuple(lines)


def test_every_module_is_in_a_room_of_the_map() -> None:
    known = {name for rooms in LEVELS for name in rooms}
    assert sorted({room(name) for name in modules() if name} - known) == []


def test_imports_are_seen_wherever_they_stand() -> None:
    """The instrument itself: this repository has imports of all three kinds, and relative ones."""
    assert {found.when for found in imports()} == {"load", "call", "types"}
    assert any(found.source == "" and found.target == "engine.engine" for found in imports())
    assert len(imports()) > 200


@pytest.mark.parametrize("whens", [("load", "call"), ("load", "call", "types")], ids=["run", "types"])
def test_no_import_goes_in_a_circle(whens: tuple[str, ...]) -> None:
    found = circles(*whens)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("whens", [("load", "call"), ("types",)], ids=["run", "types"])
def test_arrows_between_rooms_run_down_only(whens: tuple[str, ...]) -> None:
    up = [
        f"{found.source} line {found.line}: {found.target or 'reelbatch'}"
        for found in imports()
        if found.when in whens
        and found.source
        and room(found.source) != room(found.target)
        and (not found.target or level(room(found.source)) >= level(room(found.target)))
    ]
    assert not up, "\n".join(up)


def test_no_file_is_longer_than_can_be_read_at_once() -> None:
    lines = {}
    for path in modules().values():
        lines[str(path.relative_to(PACKAGE))] = len(path.read_text(encoding="utf-8").splitlines())
    long = [f"{file}: {count}" for file, count in lines.items() if count > MOST_LINES]
    assert not long, "\n".join(long)
    assert lines["engine/engine.py"] <= MOST_ENGINE_LINES


@pytest.mark.parametrize("what", FAMILY_NAMES)
def test_only_families_and_loading_name_what_one_family_has(what: str) -> None:
    named = [
        f"{file}:{number}: {line.strip()}"
        for file, number, line in code_lines()
        if not file.startswith(FAMILY_ROOMS) and FAMILY_NAMES[what].search(line)
    ]
    assert not named, "\n".join(named)


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing a module sets it on the package, in the place of a function of the same name."""
    assert set(reelbatch.__all__) & set(modules()) == set()
