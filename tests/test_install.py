"""The library alone: it imports without notebooks, jupyter or extras, and weights come with it."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

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
    committed = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()}
    assert committed == {p.relative_to(here) for p in here.rglob("*") if p.is_file()}
