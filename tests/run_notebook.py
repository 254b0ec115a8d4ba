"""Run a notebook with papermill: `run_notebook.py NOTEBOOK OUTPUT [name=value ...]`.

papermill takes a misspelt parameter without a word and guesses types (a prompt "3" becomes a
number). Here a name must be in the notebook's parameters cell and its value gets the type of the
default there. OUTPUT is written only when every cell has run; an error is the last thing printed.
"""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from versvideo.core.files import atomic_path
from versvideo.core.notebooks import defaults, parse

REPO = Path(__file__).resolve().parents[1]


def parameter_cells(notebook: nbformat.NotebookNode) -> list:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]


def leave_out_paths(notebook: nbformat.NotebookNode) -> None:
    "What cells printed, without the folders of this machine."
    places = {sys.prefix: ".venv", str(REPO): ".", tempfile.gettempdir(): "temporary"}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for place, name in places.items() if "text" in output else ():
                output["text"] = output["text"].replace(f"{place}/", f"{name}/")


def pass_on(*_: object) -> None:
    "SIGTERM is for the notebook, which saves what it trains."
    for child in psutil.Process().children(recursive=True):
        child.terminate()


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
    signal.signal(signal.SIGTERM, pass_on)
    try:
        run(notebook, output, list(arguments))
    except PapermillExecutionError as error:
        if error.ename == "Preempted":
            return print(f"{notebook} was stopped: {error.evalue}")
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
