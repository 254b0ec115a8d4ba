"""The shape of the repository: what lies where, who imports whom, where versions are written."""

import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from versvideo.lab.maintain import filled_page

REPO = Path(__file__).resolve().parents[1]
MODULES = sorted(p for p in (REPO / "versvideo").rglob("*.py") if p.name != "_modidx.py" and "weights" not in p.parts)
MEGABYTE = 2**20

TOP_LEVEL = {
    "nbs", "versvideo", "data_cards", "results", "tests", "settings.ini", "environment.yml",
    "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "setup.py", "Makefile", "LICENSE", "CITATION.cff",
    ".github", ".ci", ".gitignore", ".gitattributes", ".pre-commit-config.yaml",
}

# Imports go one way: a room may import from the rooms before it, never from those after it.
ROOMS = ["core", "media", "modules", "models", "data", "world", "pipelines", "trainers", "metrics", "lab",
         "cli", "__main__"]

# Moving Shapes is a world of its own: only what trains, judges or compares on it knows it.
KNOW_THE_WORLD = {
    "metrics.benchmark", "metrics.degradations", "metrics.features", "lab.ablation", "lab.shapes_trials",
    "trainers.recipes", "trainers.recipe_controlnet", "trainers.recipe_style", "trainers.recipe_vae",
    "trainers.recipe_clip", "lab.maintain",
}

# Heavy or optional packages, and the only modules that may import them (inside functions).
ONLY_IN = {
    "controlnet_aux": {"data.conditions"},
    "cv2": {"data.conditions"},
    "decord": {"media.readers"},
    "ipywidgets": {"pipelines.explorer"},
    "lpips": {"metrics.quality", "models.discriminator"},
    "pebble": {"data.reading"},
    "peft": {"pipelines.lora"},
    "pyarrow": {"data.manifest"},
    "webdataset": {"data.shards"},
    "IPython": {"media.show", "pipelines.explorer"},
    "matplotlib": {"media.diagrams", "media.show"},
    "jupyter": set(),
    "papermill": {"core.notebooks"},
    "nbdev": set(),
    "fastcore": set(),
}

# Where the name to install differs from the name to import.
IMPORT_NAMES = {"pillow": "PIL"}


def settings() -> dict:
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(REPO / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def requirements(key: str) -> list[Requirement]:
    return [Requirement(line) for line in settings()[key].splitlines() if line.strip()]


def repository_files() -> list[Path]:
    "Files that are or would be committed."
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO,
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git clone")
    return [REPO / name for name in done.stdout.splitlines() if (REPO / name).exists()]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO / "versvideo").with_suffix("").parts)


def imports(source: str, package: str = "versvideo") -> list[tuple[str, bool]]:
    "Absolute names that `source` imports, each with whether a plain import of the file imports it."
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            name = ".".join(part for part in (base, node.module) if part)
            names = [name] if node.module else [f"{name}.{alias.name}" for alias in node.names]
            found += [(name, id(node) not in inside) for name in names]
    return found


def module_imports(path: Path) -> list[tuple[str, bool]]:
    package = ".".join(path.parent.relative_to(REPO).parts)
    return imports(path.read_text(encoding="utf-8"), package)


def backward_imports(name: str, imported: list[str], rooms: list[str]) -> list[str]:
    "Modules of the package that module `name` imports although their room stands after its own."
    room = name.split(".")[0]
    before = rooms[: rooms.index(room) + 1]
    inner = [i.removeprefix("versvideo.") for i in imported if i.startswith("versvideo.")]
    return [i for i in inner if i.split(".")[0] not in before and i != "__version__"]


def circles(graph: dict[str, set[str]]) -> list[str]:
    "Modules that import themselves by way of others."
    def reached(name, seen):
        for other in graph.get(name, ()):
            if other not in seen:
                seen.add(other)
                reached(other, seen)
        return seen
    return [name for name in graph if name in reached(name, set())]


def test_top_level():
    names = {path.relative_to(REPO).parts[0] for path in repository_files()}
    assert names <= TOP_LEVEL, f"not for the top level: {sorted(names - TOP_LEVEL)}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_import_order(path):
    if path.name == "__init__.py":
        assert {i for i, _ in module_imports(path)} <= {"importlib"}, "a package's __init__ imports nothing"
        return
    name = module_name(path)
    imported = [i for i, _ in module_imports(path)]
    assert name.split(".")[0] in ROOMS, f"{name} lies in no room"
    assert not backward_imports(name, imported, ROOMS)
    if any(i.startswith("versvideo.world") for i in imported):
        assert name.startswith("world.") or name in KNOW_THE_WORLD, f"{name} knows Moving Shapes"


def test_no_circular_imports():
    graph = {module_name(path): {i.removeprefix("versvideo.") for i, _ in module_imports(path)
                                 if i.startswith("versvideo.")} for path in MODULES}
    assert not circles(graph)


def test_import_order_is_noticed():
    source = "from versvideo.models.unet import a\nfrom .core.files import b\nimport torch"
    names = [i for i, _ in imports(source)]
    assert names == ["versvideo.models.unet", "versvideo.core.files", "torch"]
    assert backward_imports("media.show", names, ROOMS) == ["models.unet"]
    assert imports("from ..media.show import x", "versvideo.modules") == [("versvideo.media.show", True)]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_optional_packages_are_imported_where_used(path):
    for name, at_import in module_imports(path):
        top = name.split(".")[0]
        for package, homes in ONLY_IN.items():
            if top.startswith(package):
                assert module_name(path) in homes, f"{top} is imported in {path.name}"
                assert not at_import, f"{path.name} imports {top} at once, not inside a function"


def test_imports_are_required():
    "What the library imports at once is among what `pip install .` brings."
    required = {IMPORT_NAMES.get(r.name, r.name) for r in requirements("requirements")}
    imported = [i for path in MODULES for i, at_import in module_imports(path) if at_import]
    third = {i.split(".")[0] for i in imported} - {"versvideo", *sys.stdlib_module_names}
    assert third <= required, f"not in requirements: {sorted(third - required)}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_oldest_python_can_read_it(path):
    oldest = tuple(map(int, settings()["min_python"].split(".")))
    ast.parse(path.read_text(encoding="utf-8"), feature_version=oldest)


def test_pins_are_in_one_place():
    "environment.yml and the Makefile install `.[dev]`; no file but settings.ini names a version."
    assert re.search(r"^\s+- -e \.\[dev\]$", (REPO / "environment.yml").read_text(), re.M)
    assert "--editable '.[dev]'" in (REPO / "Makefile").read_text()
    names = {r.name for r in requirements("dev_requirements") + requirements("requirements")}
    version = re.compile(rf"\b({'|'.join(map(re.escape, names))})\s*[=<>~!]=+\s*\d")
    for name in ("environment.yml", "Makefile", "README.md", ".pre-commit-config.yaml",
                 ".github/workflows/ci.yml", "setup.py"):
        path = REPO / name
        assert not path.exists() or not version.search(path.read_text()), f"{name} names a version"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_pins_are_exact_and_allowed(python):
    "On each Python every requirement has exactly one pin, and the pin satisfies the requirement."
    here = {"python_version": python, "platform_machine": "x86_64"}
    pins = [r for r in requirements("dev_requirements")
            if r.marker is None or r.marker.evaluate(here)]
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) for r in pins)
    assert len({r.name for r in pins}) == len(pins)
    pinned = {r.name: str(r.specifier)[2:] for r in pins}
    for key in ("requirements", "control_requirements", "hed_requirements",
                "metrics_requirements", "data_requirements", "notebooks_requirements"):
        for r in requirements(key):
            assert r.specifier.contains(pinned[r.name]), f"{r.name} {pinned[r.name]}"
    assert {"nbdev", "execnb", "fastcore"} <= pinned.keys()


def test_readme_names_every_room():
    "The table of the rooms is complete."
    readme = re.sub(r"<!--.*?-->", "", (REPO / "README.md").read_text(), flags=re.S)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert all(any(link.startswith(f"nbs/{room}") for link in links) for room in ROOMS[:-2])


def test_readme_is_short():
    "Three minutes for a stranger: what it is, three commands, one table of results."
    lines = (REPO / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("```sh") for line in lines[:30])


@pytest.mark.parametrize(("page", "tables"), [("README.md", 1), ("results/README.md", 13)])
def test_tables_are_those_of_the_records(page, tables):
    path = REPO / page
    assert path.read_text().count("<!-- table:") == tables
    assert filled_page(path) == path.read_text(), "make readme"


PAGES = ["README.md", "results/README.md", "CONTRIBUTING.md", "versvideo/weights/XS/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"<!--.*?-->", "", (REPO / page).read_text(), flags=re.S)
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert links and not [link for link in links if not ((REPO / page).parent / link).exists()]


def test_what_the_readme_writes_is_ignored():
    "Videos, shards and results of its commands never become part of a commit."
    assert {"my/", "out/"} <= set((REPO / ".gitignore").read_text().splitlines())
    written = re.findall(r"(?:out|data)=(\w+/)", (REPO / "README.md").read_text())
    assert written and set(written) <= {"my/", "out/"}


def test_settings_keep_papermill_working():
    assert settings()["allowed_cell_metadata_keys"] == "tags"
    assert settings()["allowed_metadata_keys"] == "papermill"


def test_ci_calls_make_test():
    lines = (REPO / ".ci/run").read_text().splitlines()
    assert lines[-1] == "make test"
    assert (REPO / ".ci/run").stat().st_mode & 0o111


def test_file_sizes():
    files = repository_files()
    large = [str(p) for p in files if p.stat().st_size > 25 * MEGABYTE]
    assert not large, f"over 25 MB: {large}"
    weights = sum(p.stat().st_size for p in files if p.suffix == ".safetensors")
    assert weights <= 32e6
    for folder, limit in (("nbs", 100_000), ("results", 500_000)):
        notebooks = [p for p in files if p.suffix == ".ipynb" and p.is_relative_to(REPO / folder)]
        assert not [p.name for p in notebooks if p.stat().st_size > limit]


def test_parameters_are_understood_by_papermill():
    "A parameter whose line has a second equals sign, also in its comment, is unknown to papermill, which warns of it."
    for path in (REPO / "nbs").glob("*.ipynb"):
        cells = [c for c in json.loads(path.read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])]
        lines = [line for c in cells for line in "".join(c["source"]).splitlines() if line.strip()]
        assert not [line for line in lines if line.count("=") > 1], path.name


# A folder of the machine something was made on: /tmp/…, C:\Users\…; not /tests/… nor a link.
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|work|tmp|Users|opt|mnt)/[\w.-]+|\b[A-Z]:\\+Users")


def written_text(notebook: dict) -> str:
    "What a notebook's outputs say, pictures left out."
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    return json.dumps([[o.get("text"), o.get("traceback"),
                        [v for k, v in o.get("data", {}).items() if not k.startswith("image/")]]
                       for o in outputs])


def test_no_paths_of_a_machine():
    "Records and outputs say nothing of the folders they were made in."
    for path in repository_files():
        if path.parts[len(REPO.parts)] not in ("nbs", "results"):
            continue
        if path.suffix in (".json", ".csv", ".md"):
            text = path.read_text(encoding="utf-8")
        elif path.suffix == ".ipynb":
            text = written_text(json.loads(path.read_text(encoding="utf-8")))
        else:
            continue
        assert not MACHINE_PATH.search(text), f"{path.name}: {MACHINE_PATH.search(text)[0]}"


def test_paths_of_a_machine_are_noticed():
    stream = {"cells": [{"outputs": [{"text": ["saved in /tmp/versvideo-x\n"]}]}]}
    result = {"cells": [{"outputs": [{"data": {"text/plain": "PosixPath('/home/me/a.gif')"}}]}]}
    assert MACHINE_PATH.search(written_text(stream)) and MACHINE_PATH.search(written_text(result))
    picture = {"cells": [{"outputs": [{"data": {"image/png": "/tmp/x"}}]}]}
    assert not MACHINE_PATH.search(written_text(picture) + "results/tmp/x https://a.org/home/x")
