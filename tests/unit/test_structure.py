"""The package's house rules that no linter checks: see docs/style.md."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import stepstate

ROOT = Path(stepstate.__file__).parent
MAX_PARAMETERS = 8
LOGGING = ("stepstate.sessions", "stepstate.transport", "stepstate.server")
MAX_OPTIONS_OF_CLIENTS = 10
"""A client's are for people: by keyword, each with its text in `help(Client)`. Values around them
would be more to learn."""


def parse() -> dict[str, ast.Module]:
    """Every module of the package that is written by hand, by its name."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        if not {"vendored", "examples"} & set(parts) and "_pb2" not in file.name:
            found[".".join(parts).removesuffix(".__init__")] = ast.parse(file.read_text())
    return found


MODULES = parse()


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of the package that one imports, for types only too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            for name in (one if one in MODULES else node.module for one in names):
                if name in MODULES:
                    yield name


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield module, node


def test_the_package_is_read():
    assert len(MODULES) > 100
    assert "stepstate.metrics.collector" in set(imported(MODULES["stepstate.metrics"]))


def test_no_files_import_each_other():
    graph = {name: set(imported(tree)) - {name} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_no_class_name_occurs_twice():
    places = defaultdict(list)
    for module, node in classes():
        places[node.name].append(module)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_no_constructor_is_wide():
    for module, node in classes():
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                parameters = len(method.args.args) - 1 + len(method.args.kwonlyargs)
                is_client = node.name == "BaseConnection"
                most = 1 + MAX_OPTIONS_OF_CLIENTS if is_client else MAX_PARAMETERS
                assert parameters <= most, f"{module}.{node.name}"


def test_every_file_says_what_it_is():
    assert not [name for name, tree in MODULES.items() if not ast.get_docstring(tree)]


def test_what_is_logged_of_a_session_says_whose_it_is():
    """Ids are unique within a tenant only: each `extra` with one has both."""
    found = []
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                if keys & {"session_id", "session"} and module.startswith(LOGGING):
                    found.append((f"{module}:{node.lineno}", "tenant" in keys))
    assert len(found) > 5
    assert not [place for place, has_tenant in found if not has_tenant]
