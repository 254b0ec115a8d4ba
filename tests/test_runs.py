"""Run notebooks and committed results: one parameters cell, no unknown names, no failed run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from processes import as_processes, ends

from versvideo.core.notebooks import (
    code_cells,
    declared_parameters,
    find_notebook,
    parse_arguments,
    remove_machine_paths,
    run_cells,
)
from versvideo.lab import maintain
from versvideo.lab.ablation import BUDGETS, NO_MEC, build_variant, gate_parameters
from versvideo.lab.results import RENAMED_PARAMETERS, read_runs
from versvideo.models.sizes import SIZES

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "nbs").glob("[2-6]?_*.ipynb"))
RESULTS = sorted([*(REPO / "results").glob("*.ipynb"), *(REPO / "results").glob("[a-z]*/*.ipynb")])


def parameter_cells(notebook: nbformat.NotebookNode) -> list:
    return [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]


def run_of(path: Path) -> str:
    "A record's name, with the folder of its machine."
    return path.relative_to(REPO / "results").with_suffix("").as_posix()


def notebook_faults(path: Path) -> list[str]:
    "What is wrong with a run notebook."
    cells = parameter_cells(nbformat.read(path, as_version=4))
    if len(cells) != 1:
        return [f"{len(cells)} cells are tagged parameters, not 1"]
    try:
        declared_parameters(cells[0].source)
    except (ValueError, SyntaxError) as error:
        return [f"the parameters are not literals: {error}"]
    return []


def result_faults(path: Path, notebooks: Path) -> list[str]:
    "What is wrong with an executed notebook, given the folder with the notebook that it executed."
    notebook = nbformat.read(path, as_version=4)
    record = notebook.metadata.get("papermill")
    if record is None:
        return ["it was not run by papermill"]
    faults = []
    if record.get("exception"):
        faults.append("the run failed")
    source = notebooks / f"{path.stem.split('-')[0]}.ipynb"
    known = declared_parameters(parameter_cells(nbformat.read(source, as_version=4))[0].source)
    given = {RENAMED_PARAMETERS.get(name, name) for name in record.get("parameters", {})}
    if unknown := given - known.keys():
        faults.append(f"unknown parameters: {', '.join(sorted(unknown))}")
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    first = next((i for i, t in enumerate(tags) if "parameters" in t), None)
    following = tags[first + 1] if first is not None and first + 1 < len(tags) else []
    if record.get("parameters") and "injected-parameters" not in following:
        faults.append("the injected parameters do not follow the parameters cell")
    return faults


def record_faults(path: Path) -> list[str]:
    "Which records of a committed training run are missing or damaged."
    faults = []
    for name in ("config.json", "metrics.json"):
        try:
            json.loads((path.with_suffix("") / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            faults.append(f"{name}: {error}")
    return faults


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_notebook(path):
    assert notebook_faults(path) == []


@pytest.mark.parametrize("path", RESULTS, ids=run_of)
def test_result(path):
    assert result_faults(path, REPO / "nbs") == []


@pytest.mark.parametrize("path", [p for p in RESULTS if p.name[0] == "2"], ids=run_of)
def test_records_of_a_training_run(path):
    assert record_faults(path) == []


@pytest.mark.parametrize("path", RESULTS, ids=run_of)
def test_a_record_is_small(path):
    "A run, its executed notebook with it, is at most 500 KB; weights and checkpoints are not committed."
    left_out = {"weights", "checkpoints", "cache", "trainings"}
    files = [p for p in path.with_suffix("").rglob("*") if p.is_file() and not left_out & {*p.parts}]
    assert sum(p.stat().st_size for p in [path, *files]) <= 500 * 1024


def test_records_agree():
    assert {run["run"] for run in read_runs(REPO / "results")} == set(map(run_of, RESULTS))


def test_make_results_makes_every_record():
    text = (REPO / "Makefile").read_text()
    made = set(re.findall(r"results/((?:[a-z][\w-]*/)?\d[\w-]*)\.ipynb", text))
    own_footage = {"34_recall-own-XS"}  # of clips that are not in the repository
    assert set(map(run_of, RESULTS)) - own_footage == made


# The guards themselves, each on a notebook with the fault that it is there to catch.

PARAMETERS = 'size: str = "smoke"  # smoke | XS\nseed: int = 0\n'


def write(path: Path, cells: list, record: dict | None = None) -> Path:
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "p"}
    if record is not None:
        notebook.metadata.papermill = record
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def tagged(source: str, *tags: str):
    return new_code_cell(source, metadata={"tags": list(tags)})


@pytest.fixture
def notebook(tmp_path) -> Path:
    body = new_code_cell('assert size == "smoke"\nprint(size, seed)')
    return write(tmp_path / "nbs" / "20_train.ipynb", [tagged(PARAMETERS, "parameters"), body])


def result(tmp_path: Path, record: dict | None, *tags: str) -> Path:
    cells = [tagged(PARAMETERS if t == "parameters" else 'size = "XS"', t) for t in tags]
    return write(tmp_path / "20_train-XS-s0.ipynb", cells, record)


def test_lost_tag_is_caught(tmp_path):
    assert notebook_faults(write(tmp_path / "20_a.ipynb", [new_code_cell(PARAMETERS)]))
    twice = [tagged(PARAMETERS, "parameters") for _ in range(2)]
    assert notebook_faults(write(tmp_path / "20_b.ipynb", twice)) == [
        "2 cells are tagged parameters, not 1"]


@pytest.mark.parametrize("source", ["size = other", "seed = max(1, 2)", "import os", "size: str"])
def test_parameters_that_are_not_literals_are_caught(tmp_path, source):
    path = write(tmp_path / "20_a.ipynb", [tagged(source, "parameters")])
    assert "not literals" in notebook_faults(path)[0]


def test_good_result_passes(tmp_path, notebook):
    path = result(tmp_path, {"parameters": {"size": "XS"}}, "parameters", "injected-parameters")
    assert notebook_faults(notebook) == []
    assert result_faults(path, notebook.parent) == []


@pytest.mark.parametrize(("record", "tags", "fault"), [
    (None, ["parameters"], "not run by papermill"),
    ({"parameters": {}, "exception": True}, ["parameters"], "failed"),
    ({"parameters": {"siez": "H"}}, ["parameters", "injected-parameters"], "siez"),
    ({"parameters": {"size": "H"}}, ["injected-parameters", "none"], "do not follow"),
    ({"parameters": {"size": "H"}}, ["parameters", "none", "injected-parameters"], "do not follow"),
])
def test_bad_result_is_caught(tmp_path, notebook, record, tags, fault):
    faults = result_faults(result(tmp_path, record, *tags), notebook.parent)
    assert len(faults) == 1 and fault in faults[0]


def test_missing_records_are_caught(tmp_path):
    path = tmp_path / "20_train-XS-s0.ipynb"
    assert len(record_faults(path)) == 2
    for name, text in (("config.json", "{}"), ("metrics.json", "{")):
        path.with_suffix("").mkdir(exist_ok=True)
        (path.with_suffix("") / name).write_text(text)
    assert ["metrics.json" in fault for fault in record_faults(path)] == [True]


# Running a notebook: parameters are checked and typed, a failed run leaves nothing behind.

def test_parameters_take_the_type_of_their_default():
    known = {"prompt": "", "steps": 0, "guidance": 1.5, "fast": False}
    given = ["prompt=3 = $three", "steps=7", "guidance=2", "fast=True"]
    assert parse_arguments(given, known) == {
        "prompt": "3 = $three", "steps": 7, "guidance": 2.0, "fast": True}
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        parse_arguments(["stepps=7"], known)
    with pytest.raises(ValueError, match="guidance='abc': give a value like 1.5"):
        parse_arguments(["guidance=abc"], known)
    with pytest.raises(ValueError, match="fast='yes': give True or False"):
        parse_arguments(["fast=yes"], known)


def run_notebook(notebook: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "versvideo", "run", notebook, "--out", output, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_run_writes_the_executed_notebook(tmp_path, notebook):
    done = run_notebook(notebook, tmp_path / "20_train-XS-s0.ipynb", "seed=3")
    assert done.returncode == 0, done.stderr
    assert "smoke 3" in done.stdout and done.stdout.splitlines()[-1].endswith(" s")
    assert result_faults(tmp_path / "20_train-XS-s0.ipynb", notebook.parent) == []


def test_folders_of_the_machine_are_left_out(monkeypatch):
    monkeypatch.chdir(REPO)
    cell = new_code_cell(outputs=[new_output("stream", text=f"{sys.prefix}/lib/x.py and {REPO}/nbs"),
                                  new_output("display_data", data={"image/png": "/"})])
    remove_machine_paths(new_notebook(cells=[cell]))
    assert cell.outputs[0].text == ".venv/lib/x.py and ./nbs"


@pytest.mark.parametrize(("argument", "message"), [
    ("size=XS", "AssertionError"),
    ("siez=XS", "did you mean 'size'"),
    ("seed=x", "seed='x': give a value like 0"),
])
def test_failed_run_says_why_and_leaves_nothing(tmp_path, notebook, argument, message):
    done = run_notebook(notebook, tmp_path / "out" / "a.ipynb", argument)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("out/*"))


# Plain papermill is as strict: every run notebook checks what it was given.
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_run_notebook_checks_its_parameters(path):
    "The first code cell after the parameters, where papermill's own cell comes between them."
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    tagged, = (i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    assert cells[tagged + 1].source.split("\n\n") == [
        "from versvideo.core.notebooks import check_parameters", "check_parameters()"]


@pytest.mark.parametrize(("parameter", "value", "message"), [
    ("stepz", "4", "did you mean 'steps'"),
    ("steps", "4x", "steps='4x' is a str, declared is 0: give a value like 0"),
    ("data", "3", "papermill takes it as text by -r data 3"),
])
def test_papermill_refuses_what_is_not_declared(tmp_path, parameter, value, message):
    papermill = Path(sys.executable).parent / "papermill"
    done = subprocess.run([papermill, REPO / "nbs/20_train_unet.ipynb", tmp_path / "out.ipynb", "-p", parameter, value],
                          cwd=REPO, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize("name", ["50_ablation_unet", "51_ablation_moe", "52_ablation_mec", "55_ablation_start"])
def test_every_variant_of_an_ablation_is_built_and_learns(name):
    "Here, as the run at size smoke trains only some of them."
    space = {}
    for _, _, source in code_cells(find_notebook(name)):
        exec(source.partition("study = Study(")[0], space)
        if "variants" in space:
            break
    assert len({v.name for v in space["variants"]}) == len(space["variants"]) > 3
    x, text = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, SIZES["smoke"].unet["cross_attention_dim"])
    for variant in space["variants"]:
        unet = build_variant(variant, BUDGETS["smoke"]).train()
        unet(x, 400, text).sample.square().mean().backward()
        gates = dict(unet.named_parameters())
        assert all(gates[n].grad is not None for n in gate_parameters(unet)), variant.name
        assert bool(gate_parameters(unet)) == (variant.mec != NO_MEC)


# A run again.
def test_what_drifted_is_named(tmp_path, monkeypatch, capsys):
    record = tmp_path / "results/33_judge-XS-s0/metrics.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"colour": 0.9, "seconds": 3.0}))
    for command in (["init", "-q"], ["add", "."],
                    ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a run"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(maintain, "repo_path", tmp_path.joinpath)
    record.write_text(json.dumps({"colour": 0.91, "seconds": 9.0}))
    maintain.compare_with_commit()
    assert "33_judge-XS-s0: no numbers drifted" in capsys.readouterr().out
    record.write_text(json.dumps({"colour": 0.7, "seconds": 3.0}))
    with pytest.raises(ValueError, match="33_judge-XS-s0: colour was 0.9, is 0.7"):
        maintain.compare_with_commit("33_judge-XS-s0")


def test_a_run_that_is_not_there_is_not_made_again(monkeypatch):
    monkeypatch.chdir(REPO)
    with pytest.raises(ValueError, match="'33_judge' is not a run.*33_judge-XS-s0"):
        maintain.run_again("33_judge")


SHOWING = """
import torch
from versvideo.media.show import play, show_clips, show_table
show_clips(torch.rand(1, 3, 4, 16, 16))
play(torch.rand(3, 4, 16, 16))
show_table([dict(step=1, loss=0.5)])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_tables_and_pictures_of_a_run_land_in_its_folder(tmp_path, processes):
    "As torchrun and accelerate start it, without --out; the first process alone writes."
    parameters = new_code_cell("out: str = ''  # Folder", metadata=dict(tags=["parameters"]))
    nbformat.write(new_notebook(cells=[parameters, new_code_cell(SHOWING)]), tmp_path / "showing.ipynb")
    assert ends(as_processes(processes, run_cells, tmp_path / "showing.ipynb", [f"out={tmp_path / 'run'}"])) \
        == [0] * processes
    page = (tmp_path / "run" / "shown.md").read_text()
    assert page.endswith("![](shown/01.jpeg)\n\n![](shown/02.gif)\n\n```\nstep  loss\n1     0.5\n```\n")
    assert all((tmp_path / "run" / "shown" / name).stat().st_size for name in ("01.jpeg", "02.gif"))


def test_a_script_says_where_its_pictures_are(tmp_path):
    done = subprocess.run([sys.executable, "-c", SHOWING], cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["shown:"] * 2, done.stderr
    assert all(Path(line.removeprefix("shown: ")).stat().st_size for line in lines)
