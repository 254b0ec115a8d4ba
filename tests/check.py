"""Checks beyond unit tests: `check.py sync | installed | runs | changed`.

None of them changes a file of the repository.
"""

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from versvideo.core.records import read_json
from versvideo.media.video import write_video
from versvideo.world.shapes import MovingShapes

REPO = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SOURCES = ("settings.ini", "pyproject.toml", "nbs", "versvideo", "results")


def copy_tree(to: Path, names: tuple[str, ...]) -> None:
    "Copy what is named, without weights, checkpoints and caches."
    skip = shutil.ignore_patterns("weights", "checkpoints", "cache", "__pycache__", ".ipynb_*")
    for name in names:
        source = REPO / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=skip)
        elif source.exists():
            shutil.copy(source, to / name)


def call(*command: str | Path, cwd: Path, **env: str) -> None:
    "Run a command quietly; SystemExit with all that it printed when it fails."
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(map(str, command))} failed")


def texts(root: Path) -> dict[str, str]:
    files = [p for p in root.rglob("*") if p.suffix in (".ipynb", ".py")]
    return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in files}


def report(before: dict, after: dict, remedy: str) -> None:
    "SystemExit with the difference and the remedy when two sets of files differ."
    changed = [n for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)]
    for name in changed:
        old, new = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        print(*list(difflib.unified_diff(old, new, name, name, n=1, lineterm=""))[:9], sep="\n")
    if changed:
        raise SystemExit(f"\n{len(changed)} files differ: {', '.join(changed)}. {remedy}")


def check_sync(repo_copy: Path) -> None:
    "Notebooks are clean and the modules are exactly what they export."
    before = texts(repo_copy)
    for command in (["nbdev_clean"], ["nbdev_clean", "--fname", "results"]):
        call(BIN / command[0], *command[1:], cwd=repo_copy)
    report(before, texts(repo_copy), "Run .venv/bin/nbdev_clean and .venv/bin/nbdev_clean "
           "--fname results, then commit what they changed.")
    for module in (repo_copy / "versvideo").rglob("*.py"):
        if module.name not in ("__init__.py", "__main__.py"):
            module.unlink()
    call(BIN / "nbdev_export", cwd=repo_copy)
    report(before, texts(repo_copy), "The modules (-) are not what the notebooks export (+). Edit "
           "the notebook, run .venv/bin/nbdev_export and commit both.")


def sync() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder), SOURCES)
        check_sync(Path(folder))
    print("sync: notebooks are clean and exported")


def installed() -> None:
    "pytest on a copy of the package that pip installed, from a folder outside the repository."
    with tempfile.TemporaryDirectory() as folder:
        source, site, away = (Path(folder) / name for name in ("source", "site", "away"))
        for path in (source, away):
            path.mkdir()
        copy_tree(source, ("settings.ini", "setup.py", "pyproject.toml", "README.md", "versvideo", "nbs"))
        if (REPO / "versvideo/weights").exists():
            shutil.copytree(REPO / "versvideo/weights", source / "versvideo/weights")
        call(sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation",
             "--target", site, source, cwd=away)
        env = os.environ | {"PYTHONPATH": str(site)}
        ask = [sys.executable, "-c", "import versvideo; print(versvideo.__file__)"]
        where = subprocess.check_output(ask, cwd=away, env=env, text=True)
        assert Path(where.strip()).is_relative_to(site), f"tests would import {where.strip()}"
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile",
                 "--durations=15", "-p", "no:cacheprovider",
                 "-c", str(REPO / "pyproject.toml"), "--rootdir", str(REPO), str(REPO / "tests")]
        code = subprocess.run(tests, cwd=away, env=env).returncode
    if code:
        raise SystemExit(code)


def runs() -> None:
    """Run notebooks as users start them: by papermill at their defaults, which take seconds on a CPU, and some at other
    parameters, by torchrun and by accelerate. `make test` leaves them out of nbdev_test, which would run them again.
    """
    notebooks = [(path,) for path in sorted((REPO / "nbs").glob("[2-6]?_*.ipynb"))]
    notebooks += [(REPO / "nbs/21_train_vae.ipynb", "stage=tcm", "perceptual=clip", *more)
                 for more in ((), ("without=tcm+refinement",))]
    notebooks += [(REPO / "nbs/23_train_style.ipynb", "model=XS", "stage=captions", "even=True",
                   "adapter=versvideo/weights/XS", "workers=1")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        own = MovingShapes.full("test", 0, frames=40, size=(90, 120)).batch([0]).clips[0]
        write_video(own, Path(folder) / "own.mp4", fps=30)
        Image.fromarray(own[:, 0].permute(1, 2, 0).numpy()).save(Path(folder) / "own.png")
        notebooks += [(REPO / "nbs/32_edit.ipynb", f"video={folder}/own.mp4",
                       f"style={folder}/own.png", "steps=4")]

        def smoke(run: tuple) -> float:
            start, (notebook, *parameters) = time.monotonic(), run
            call(sys.executable, "-m", "versvideo", "run", f"nbs/{notebook.name}", *parameters, "--out",
                 Path(folder) / f"{len(parameters)}-{notebook.name}", cwd=REPO, OMP_NUM_THREADS="1")
            return time.monotonic() - start

        for run, seconds in zip(notebooks, pool.map(smoke, notebooks), strict=True):
            print(*(run[0].name, *run[1:]), f"{seconds:.0f} s", flush=True)
        for name in ("20_train_unet", "41_table2_ucf101"):
            two = Path(folder) / f"two-{name}"
            call(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "-m", "versvideo", "run",
                 f"nbs/{name}.ipynb", f"out={two}", "--out", f"{two}.ipynb", cwd=REPO, OMP_NUM_THREADS="1")
            assert Path(f"{two}.ipynb").exists() and read_json(two / "config.json")["processes"] == 2
            print(f"{name}.ipynb by two processes", flush=True)
        launched = Path(folder) / "launched"
        call(BIN / "accelerate", "launch", "--cpu", "--num_processes", 1, "--num_machines", 1,
             "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "versvideo", "run",
             "nbs/22_train_controlnet.ipynb", f"out={launched}", cwd=REPO, OMP_NUM_THREADS="1")
        assert read_json(launched / "metrics.json")["seconds"] > 0
        print("22_train_controlnet.ipynb by accelerate launch", flush=True)


# Which test files look after which room, for a quick check of what has changed.
TESTS = {
    "core": ("test_runs", "test_cli"), "media": (), "modules": ("test_mec", "test_moe"),
    "models": ("test_text", "test_weights"), "data": ("test_cards", "test_prepare", "test_conditions"),
    "world": ("test_shapes",), "pipelines": ("test_contracts",), "trainers": ("test_contracts",),
    "metrics": ("test_scores",), "lab": ("test_plan",),
}


def changed() -> None:
    "The changed library notebooks, and the quick tests of their rooms. `make test` has the slow ones."
    status = ["git", "status", "--porcelain", "--untracked-files=all", "nbs"]
    listed = subprocess.check_output(status, cwd=REPO, text=True)
    paths = [REPO / line[3:].split(" -> ")[-1] for line in listed.splitlines()]
    notebooks = [p for p in paths if p.exists() and p.suffix == ".ipynb" and p.parent != REPO / "nbs"]
    files = sorted({f"tests/{name}.py" for p in notebooks for name in TESTS[p.parent.name]})
    if not notebooks:
        print("no library notebook has changed since the last commit")
        return
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda p: call(BIN / "nbdev_test", "--path", p, cwd=REPO, OMP_NUM_THREADS="1"), notebooks)
        for path, _ in zip(notebooks, done, strict=True):
            print(path.relative_to(REPO), flush=True)
    if files:
        call(sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", *files, cwd=REPO)
        print(*files)


if __name__ == "__main__":
    {"sync": sync, "installed": installed, "runs": runs, "changed": changed}[sys.argv[1]]()
