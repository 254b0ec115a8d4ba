"""The library alone imports without notebooks, jupyter or extras; what make does before it installs and starts."""

import importlib.util
import io
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from threading import Thread

import pytest
from processes import free_port

import versvideo

TESTS = Path(__file__).parent


def test_imports_without_extras(tmp_path):
    done = subprocess.run([sys.executable, TESTS / "import_all.py"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_all_notices_an_eager_import(tmp_path):
    "The check itself works: a package that imports decord at once is caught."
    package = tmp_path / "versvideo"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "eager.py").write_text("import decord\n")
    done = subprocess.run([sys.executable, TESTS / "import_all.py"], cwd=tmp_path,
                          env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode != 0 and "decord" in done.stderr


def test_version_and_extras():
    try:
        package = distribution("versvideo")
    except PackageNotFoundError:
        pytest.skip("versvideo is on the path but not installed")
    assert package.version == versvideo.__version__
    extras = package.metadata.get_all("Provides-Extra")
    assert {"control", "metrics", "data", "notebooks", "dev"} <= set(extras)
    needed = [line for line in package.requires if "extra ==" not in line]
    assert not any(line.startswith(("decord", "lpips", "jupyter", "nbdev")) for line in needed)


def test_weights_are_package_data():
    folder = TESTS.parent / "versvideo" / "weights"
    if not folder.exists():
        pytest.skip("no weights are committed yet")
    here = Path(versvideo.__file__).parent / "weights"
    files = lambda place: {p.relative_to(place) for p in place.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert files(folder) == files(here)


INDEX = TESTS.parent / ".ci" / "index.py"


@pytest.fixture
def index(monkeypatch, tmp_path):
    "The script of `make install`, on a machine without a GPU and without an environment."
    spec = importlib.util.spec_from_file_location("index", INDEX)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setattr(module, "wants_cuda", lambda: True)
    return module


def test_an_index_that_does_not_answer_is_one_line(index, monkeypatch):
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://name:secret@127.0.0.1:{free_port()}/simple")
    with pytest.raises(SystemExit, match="127.0.0.1 does not answer .*: correct or unset it") as error:
        index.main()
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_an_index_that_answers_is_taken(index, monkeypatch, capsys):
    "Any answer will do: here the page does not exist."
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://name:secret@127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", url)
    index.main()
    server.shutdown()
    server.server_close()
    assert capsys.readouterr().out == f"{url}\n"


@pytest.mark.parametrize(("answer", "taken"), [("\n", True), ("y\n", True), ("no\n", False), (None, False)])
def test_without_a_gpu_the_small_pytorch_is_offered(index, monkeypatch, capsys, answer, taken):
    "None: there is nobody to answer."
    asked = io.StringIO(answer or "")
    asked.isatty = lambda: answer is not None
    monkeypatch.setattr(sys, "stdin", asked)
    index.main()
    said = capsys.readouterr()
    assert said.out.strip() == (index.SMALL if taken else "") and "no NVIDIA GPU" in said.err
    assert (answer is None) == ("export PIP_EXTRA_INDEX_URL=" in said.err)


def make(tmp_path, *arguments):
    "Run make with an environment that counts as installed."
    (tmp_path / "installed").touch()
    done = subprocess.run(["make", "-C", TESTS.parent, f"INSTALLED={tmp_path / 'installed'}", *arguments],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


@needs_make
@pytest.mark.parametrize("name", ["PROMPT", "prompt"])
def test_make_takes_a_prompt_in_any_case(tmp_path, name):
    said = make(tmp_path, "quickstart", f"{name}=a red star, it's $5", "RUN=echo")
    assert "prompt=a red star, it's $5 out=out" in said


@needs_make
def test_make_lab_works_as_root(tmp_path):
    (tmp_path / "jupyter").write_text('#!/bin/sh\necho "jupyter $@"\n')
    (tmp_path / "jupyter").chmod(0o755)
    said = make(tmp_path, "lab", f"BIN={tmp_path}")
    assert "lab --LabApp.default_url=/lab/tree/nbs" in said.replace("--allow-root ", "")
    assert ("--allow-root" in said) == ("You are root" in said) == (os.geteuid() == 0)
