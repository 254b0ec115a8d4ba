"Run a notebook cell by cell in this process, with parameters in place of its defaults."

import warnings
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


def run_cells(notebook, **parameters):
    "The names that the notebook of that path below nbs/ defines."
    names = {}
    for cell in nbformat.read(NOTEBOOKS / notebook, as_version=4).cells:
        if cell.cell_type == "code":
            with warnings.catch_warnings():
                exec(cell.source, names)
            if "parameters" in cell.metadata.get("tags", []):
                assert parameters.keys() <= names.keys()
                names.update(parameters)
    return names
