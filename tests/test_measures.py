"""How the notebooks are written, measured: sizes of cells, functions and modules, and what is shown of each name.

`pytest -rP tests/test_measures.py` prints the numbers.
"""

import ast
import json
import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest

REPO = Path(__file__).resolve().parents[1]
LIBRARY = sorted([*(REPO / "nbs").glob("*/*.ipynb"), REPO / "nbs/cli.ipynb"])
MODULES = sorted(p for p in (REPO / "versvideo").rglob("*.py") if p.name != "_modidx.py" and "weights" not in p.parts)
LONG_CALLS = {("text_to_video", "__call__")}  # The pipeline's: its arguments alone are forty lines


def code_of(source: str) -> str:
    "A cell without directives and magics."
    return "\n".join(line for line in source.splitlines() if not re.match(r"\s*[%!]|#\|", line)).strip()


def cells_of(notebook: dict) -> list[tuple[bool, str]]:
    "Whether each code cell is exported, and its code."
    sources = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    return [(bool(re.match(r"#\|\s*export\b", source)), code_of(source)) for source in sources]


@cache
def library() -> dict[str, list[tuple[bool, str]]]:
    return {f"{p.parent.name}/{p.stem}": cells_of(json.loads(p.read_text(encoding="utf-8"))) for p in LIBRARY}


def exported() -> dict[str, list[str]]:
    return {name: [code for is_exported, code in cells if is_exported] for name, cells in library().items()}


def functions(code: str) -> list[tuple[str, int]]:
    "Name and lines of every function and method."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.name, n.end_lineno - n.lineno + 1) for n in ast.walk(ast.parse(code)) if isinstance(n, kinds)]


def public_names(code: str) -> list[str]:
    "Functions and classes that a cell defines."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in ast.parse(code).body if isinstance(n, kinds) and not n.name.startswith("_")]


def shown_soon(cells: list[tuple[bool, str]]) -> dict[str, bool]:
    "Each public name, and whether one of the next three code cells uses or asserts it."
    found = {}
    for i, (is_exported, code) in enumerate(cells):
        for name in public_names(code) if is_exported else ():
            found[name] = any(re.search(rf"\b{name}\b", later) for _, later in cells[i + 1:i + 4])
    return found


def test_exported_cells_are_short():
    lengths = {f"{name} #{i}": len(code.splitlines())
               for name, codes in exported().items() for i, code in enumerate(codes)}
    print(f"{len(lengths)} exported cells, median {median(lengths.values())} lines, longest {max(lengths.values())}")
    assert median(lengths.values()) <= 12
    assert not {name: n for name, n in lengths.items() if n > 80}


def test_functions_are_short():
    lengths = {(name.split("/")[1], function): n for name, codes in exported().items()
               for code in codes for function, n in functions(code)}
    print(f"{len(lengths)} functions, longest {max(n for key, n in lengths.items() if key not in LONG_CALLS)} lines")
    assert not {key: n for key, n in lengths.items() if n > 40 and key not in LONG_CALLS}


def test_modules_are_short():
    lengths = {path.relative_to(REPO).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    print(f"{len(lengths)} modules, longest {max(lengths.values())} lines")
    assert not {name: n for name, n in lengths.items() if n > 400}


def test_lines_are_short():
    "Of modules, but for the list of names that nbdev writes; ruff (E501) measures the cells of notebooks."
    lines = {f"{path.relative_to(REPO)}:{i}": len(line) for path in MODULES
             for i, line in enumerate(path.read_text().splitlines(), 1) if not line.startswith("__all__ = ")}
    print(f"longest exported line {max(lines.values())} columns")
    assert not {place: n for place, n in lines.items() if n > 120}


def test_names_are_shown_where_they_are_defined():
    shown = {(name, symbol): seen for name, cells in library().items() for symbol, seen in shown_soon(cells).items()}
    share = sum(shown.values()) / len(shown)
    print(f"{share:.0%} of {len(shown)} public names are used or asserted within three code cells")
    assert share >= 0.85, [key for key, seen in shown.items() if not seen]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebook_has_a_title_and_asserts(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = "".join(notebook["cells"][0]["source"])
    assert re.match(r"# .+\n+> .+", first), "begin with a title and one line that says what the module is for"
    tests = [code for is_exported, code in cells_of(notebook) if not is_exported]
    assert any(re.search(r"\bassert\b|\btest_\w+\(", code) for code in tests)


def test_gradients_are_switched_on_again():
    "nbdev_test runs several notebooks in one process, and the setting is the process's."
    for name, cells in library().items():
        code = "\n".join(code for _, code in cells)
        off, on = code.rfind("set_grad_enabled(False)"), code.rfind("set_grad_enabled(True)")
        assert off <= on, f"{name} leaves gradients switched off"


def test_the_measures_notice():
    cells = [(True, "def a(): pass"), (False, "1"), (False, "2"), (False, "3"), (False, "a()"),
             (True, "def b(): pass"), (False, "b()")]
    assert shown_soon(cells) == {"a": False, "b": True}
    assert functions("class A:\n    def f(self):\n        return 1\n") == [("f", 2)]
    assert cells_of({"cells": [{"cell_type": "code", "source": ["#| export\n", "x = 1"]}]}) == [(True, "x = 1")]
