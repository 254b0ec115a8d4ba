"""Checks beyond unit tests: `check.py sync | notebooks | installed | changed`.

None of them changes a file of the repository.
"""

import difflib
import gc
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import versvideo
from versvideo.cli import main
from versvideo.core.notebooks import code_cells, find_notebook, parameter_values, run_cells
from versvideo.core.records import read_json

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
    files = [p for p in root.rglob("*") if p.suffix in (".ipynb", ".py") and "weights" not in p.relative_to(root).parts]
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
        if module.name not in ("__init__.py", "__main__.py", "pipeline.py"):
            module.unlink()
    call(BIN / "nbdev_export", cwd=repo_copy)
    report(before, texts(repo_copy), "The modules (-) are not what the notebooks export (+). Edit "
           "the notebook, run .venv/bin/nbdev_export and commit both.")


def sync() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(Path(folder), SOURCES)
        for path in (REPO / "versvideo/weights").glob("*/pipeline.py"):  # nbdev lists it with the modules
            copy = Path(folder) / path.relative_to(REPO)
            copy.parent.mkdir(parents=True)
            shutil.copy(path, copy)
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
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder",
                 "--durations=15", "-p", "no:cacheprovider",
                 "-c", str(REPO / "pyproject.toml"), "--rootdir", str(REPO), str(REPO / "tests")]
        code = subprocess.run(tests, cwd=away, env=env).returncode
    if code:
        raise SystemExit(code)


def in_a_fork(work: Callable, said: Path) -> None:
    "Do the work in the repository; what it prints and its temporary files go to a folder."
    said.mkdir()
    with open(said / "said.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPO)
    os.environ["TMPDIR"] = tempfile.tempdir = str(said)
    work()


def two_at_a_time(jobs: dict[str, Callable], folder: Path) -> None:
    """Do the jobs, by name, in forks of this process; SystemExit naming those that failed, after what they printed.

    Forks have what this process has imported; it must have no threads.
    """
    waiting, running, failed = list(enumerate(jobs.items())), {}, []
    while waiting or running:
        while waiting and len(running) < 2:
            number, (name, work) = waiting.pop(0)
            process = get_context("fork").Process(target=in_a_fork, args=(work, folder / str(number)))
            process.start()
            running[process.sentinel] = name, process, folder / str(number) / "said.txt", time.monotonic()
        for sentinel in wait(running):
            name, process, said, start = running.pop(sentinel)
            process.join()
            if process.exitcode:
                print(said.read_text(errors="replace"), file=sys.stderr)
                failed.append(name)
            print(name, "FAILED" if process.exitcode else f"{time.monotonic() - start:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


def import_everything() -> None:
    "So that forks need not. With one thread, as a fork has no others."
    os.environ["OMP_NUM_THREADS"] = "1"
    modules = pkgutil.walk_packages(versvideo.__path__, "versvideo.")
    for name in (*(module.name for module in modules), "execnb.shell", "matplotlib.pyplot", "nbdev.test"):
        import_module(name)
    gc.freeze()


def in_a_shell(name: str, *arguments: str) -> None:
    "A run notebook as Jupyter runs it, what it shows included, but in this process."
    from execnb.shell import CaptureShell, format_exc
    notebook = find_notebook(name)
    values, shell = parameter_values(notebook, arguments), CaptureShell(notebook)
    for cell, tags, source in code_cells(notebook):
        outputs = shell.run(source)
        if shell.exc:
            raise SystemExit(f"{outputs}\n{''.join(format_exc(shell.exc))}\n{name}, cell {cell} failed")
        if "parameters" in tags:
            shell.user_ns.update(values)


def by_command(*arguments: str | Path) -> None:
    "As `versvideo` with these arguments, in this process."
    if main(list(map(str, arguments))):
        raise SystemExit(f"versvideo {' '.join(map(str, arguments))} failed")


def in_two_forks(work: Callable, *arguments) -> None:
    "As two processes of a launcher."
    from processes import as_processes, ends
    assert ends(as_processes(2, work, *arguments)) == [0, 0]


def as_users_start_them(folder: Path) -> dict[str, Callable]:
    "By papermill, on two processes, by accelerate, on one's own video. 61_scale starts one by torchrun."
    from PIL import Image

    from versvideo.media.video import write_video
    from versvideo.world.shapes import MovingShapes

    def edit() -> None:
        own = MovingShapes.full("test", 0, frames=40, size=(90, 120)).batch([0]).clips[0]
        write_video(own, folder / "own.mp4", fps=30)
        Image.fromarray(own[:, 0].permute(1, 2, 0).numpy()).save(folder / "own.png")
        in_a_shell("32_edit", f"video={folder / 'own.mp4'}", f"style={folder / 'own.png'}", "steps=4")

    def own_videos() -> None:
        "From videos with captions to a model of them, its ControlNet, and how well it knows them."
        mine, made = folder / "mine", {name: folder / "of_mine" / name for name in ("vae", "clip", "shards", "unet")}
        mine.mkdir()
        for i, clip in enumerate(MovingShapes.full("test", 0, frames=16, size=(40, 60)).batch(range(5)).clips):
            write_video(clip, mine / f"{i}.mp4", fps=8)
            (mine / f"{i}.txt").write_text(f"video number{i} of a lake")
        models = [f"vae={made['vae']}/weights", f"clip={made['clip']}/weights"]
        in_a_shell("21_train_vae", f"data={mine}", f"out={made['vae']}")
        in_a_shell("24_train_clip", "size=XS", "steps=4", f"data={mine}", f"out={made['clip']}")
        in_a_shell("26_prepare", f"data={mine}", *models, f"out={made['shards']}")
        in_a_shell("20_train_unet", f"data={made['shards']}", *models, "sample_every=2",
                   "prompts=a lake | video number3", f"out={made['unet']}")
        assert {path.name for path in (made["unet"] / "samples").iterdir()} == {"step-000002.jpg", "step-000004.jpg"}
        in_a_shell("22_train_controlnet", f"model={made['unet']}/weights", f"data={made['shards']}", "conditions=canny",
                   f"out={folder / 'of_mine' / 'control'}")
        in_a_shell("23_train_style", f"model={made['unet']}/weights", f"data={made['shards']}",
                   f"out={folder / 'of_mine' / 'style'}")
        in_a_shell("34_recall", f"model={made['unet']}/weights", f"data={mine}", f"clip={made['clip']}/weights",
                   "steps=2", f"out={folder / 'of_mine' / 'recall'}")
        found = read_json(folder / "of_mine/recall/metrics.json")
        assert found["clips"] == 5 and 5 < found["psnr_db"] < 40 and len(found["ranks"]["clip"]) == 5

    def train() -> None:
        in_two_forks(by_command, "run", "20_train_unet", f"out={folder / 'two'}", "--out", folder / "two.ipynb")
        assert (folder / "two.ipynb").exists() and read_json(folder / "two/config.json")["processes"] == 2

    def accelerate() -> None:
        call(BIN / "accelerate", "launch", "--cpu", "--num_processes", 1, "--num_machines", 1, "--mixed_precision",
             "no", "--dynamo_backend", "no", "-m", "versvideo", "run", "22_train_controlnet",
             f"out={folder / 'launched'}", cwd=REPO)
        assert read_json(folder / "launched/metrics.json")["seconds"] > 0

    def table() -> None:
        in_two_forks(run_cells, "41_table2_ucf101", [f"out={folder / 'table'}"])
        assert read_json(folder / "table/config.json")["processes"] == 2

    return {"20_train_unet on two processes, by papermill": train, "22_train_controlnet by accelerate": accelerate,
            "30_generate by papermill": partial(by_command, "run", "30_generate", "--out", folder / "generate.ipynb"),
            "32_edit, own video": edit, "20 to 34, own videos": own_videos,
            "41_table2_ucf101 on two processes": table}


def run_notebooks(folder: Path) -> dict[str, Callable]:
    "All of them: at their defaults, or with less where these take long, and some with other parameters."
    ablations = {"50_ablation_unet": "", "51_ablation_moe": "both; 2 experts", "52_ablation_mec": "MEC; magnitude",
                 "55_ablation_start": "2D+1D, one FFN; centred"}
    same = (f"runs={folder / 'ablations'}", "first_seed=0", "held_out=1")  # their trainings are shared
    fewer = {"31_control": ("steps=2",), "32_edit": ("steps=2",), "33_judge": ("steps=8",), "34_recall": ("steps=2",),
             "56_ablation_decoder": ("only=image decoder, trained on; mapped consistency",),
             "54_excitations": ("n=1", "clips=1")}
    runs = [(path.stem, *fewer.get(path.stem, ())) for path in sorted((REPO / "nbs").glob("[2-6]?_*.ipynb"))
            if path.stem not in (*ablations, "30_generate")]
    runs += [("21_train_vae", "stage=tcm", "perceptual=clip", "without=tcm+refinement"),
             ("23_train_style", "model=XS", "stage=captions", "even=True", "adapter=versvideo/weights/XS", "workers=1")]
    runs.sort(key=lambda run: not run[0].startswith(("56", "61", "65")))  # the longest first
    jobs = {", ".join(ablations): lambda: [in_a_shell(name, f"only={only}", *same) for name, only in ablations.items()]}
    return jobs | {" ".join(run): partial(in_a_shell, *run) for run in runs}


def library_notebooks() -> dict[str, Callable]:
    "All others, as `nbdev_test` runs them."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    def test(path: Path) -> None:
        if not test_nb(path, skip_flags=get_config(cfg_name=REPO / "settings.ini").tst_flags.split())[0]:
            raise SystemExit(1)

    paths = [path for path in sorted((REPO / "nbs").rglob("*.ipynb")) if not re.match(r"[._]|[2-6]\d_", path.name)]
    return {str(path.relative_to(REPO / "nbs")): partial(test, path) for path in paths}


def notebooks() -> None:
    "Every notebook runs through, two at a time, from a process that has imported what takes seconds."
    import_everything()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        two_at_a_time(as_users_start_them(folder) | run_notebooks(folder) | library_notebooks(), folder)


# Which test files look after which room, for a quick check of what has changed.
TESTS = {
    "core": ("test_runs", "test_cli"), "media": (), "modules": ("test_mec", "test_moe"),
    "models": ("test_text", "test_weights", "test_offload"), "data": ("test_cards", "test_prepare", "test_conditions"),
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
    {"sync": sync, "notebooks": notebooks, "installed": installed, "changed": changed}[sys.argv[1]]()
