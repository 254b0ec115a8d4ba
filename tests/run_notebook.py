"""Run a notebook with papermill: `run_notebook.py NOTEBOOK OUTPUT [name=value ...]`.

papermill takes a misspelt parameter without a word and guesses types (a prompt "3" becomes a
number). Here a name must be in the notebook's parameters cell and its value gets the type of the
default there. OUTPUT is written only when every cell has run; an error is the last thing printed.
"""

import ast
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from versvideo.core import atomic_path, pick

REPO = Path(__file__).resolve().parents[1]


def parameter_cells(notebook: nbformat.NotebookNode) -> list:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]


def defaults(source: str) -> dict:
    "Names and values that a parameters cell assigns; ValueError where one is not a literal."
    found = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            raise ValueError(f"line {node.lineno} of the parameters cell is not `name = literal`")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        found |= {target.id: ast.literal_eval(node.value) for target in targets}
    return found


def parse(arguments: list[str], known: dict) -> dict:
    "Values of `name=value` arguments, each with the type of the notebook's own default."
    values = {}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not name=value")
        default = pick(known, name, "parameter")
        kind = type(default)
        try:
            values[name] = {"True": True, "False": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError) as error:
            wanted = "True or False" if kind is bool else f"a value like {default!r}"
            raise ValueError(f"{name}={text!r}: give {wanted}") from error
    return values


def leave_out_paths(notebook: nbformat.NotebookNode) -> None:
    "What cells printed, without the folders of this machine."
    places = {sys.prefix: ".venv", str(REPO): ".", tempfile.gettempdir(): "temporary"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for place, name in places.items() if "text" in output else ():
                output["text"] = output["text"].replace(f"{place}/", f"{name}/")


def run(notebook: str, output: str, arguments: list[str]) -> None:
    "Execute `notebook` and write it to `output`, both relative to the repository."
    cell, = parameter_cells(nbformat.read(notebook, as_version=4))
    values = parse(arguments, defaults(cell.source))
    unfinished = Path(tempfile.mkdtemp(prefix="versvideo-")) / Path(output).name
    try:
        executed = papermill.execute_notebook(
            notebook, unfinished, values, kernel_name="python3", progress_bar=False,
            stdout_file=sys.stdout, stderr_file=sys.stderr,
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"])
    except (PapermillExecutionError, DeadKernelError):
        print(f"\nThe notebook up to the error: {unfinished}", file=sys.stderr)
        raise
    executed.metadata.papermill["output_path"] = output
    leave_out_paths(executed)
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one writes
        with atomic_path(output) as temp:
            nbformat.write(executed, temp)
    unfinished.unlink()
    unfinished.parent.rmdir()


def main(notebook: str, output: str, *arguments: str) -> str | None:
    "Run and say where the result is and how long it took; the text of an error for sys.exit."
    os.chdir(REPO)
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # no widgets here, and no path in the record
    start = time.monotonic()
    try:
        run(notebook, output, list(arguments))
    except PapermillExecutionError as error:
        return f"{notebook} failed.\n{error.ename}: {error.evalue}"
    except DeadKernelError:
        return f"{notebook} failed: its process was killed, most often because memory ran out."
    except (OSError, ValueError) as error:
        return f"{notebook} was not run. {error}"
    except KeyboardInterrupt:
        trains = Path(notebook).name.startswith("2") and any(a.startswith("out=") for a in arguments)
        return f"{notebook} was stopped." + (
            " Run it again to continue from its last checkpoint." if trains else "")
    print(f"{output}  {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
