"""Checks beyond unit tests: `check.py sync | installed | runs | drift | again`, and `ship`.

None of them changes a file of the repository, except `ship`, which is there to do that.
"""

import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import torch
from PIL import Image
from run_notebook import defaults

from versvideo.core.records import read_json, tensors_digest
from versvideo.lab.results import RENAMED_PARAMETERS, drifted, fill_tables
from versvideo.media.video import write_video
from versvideo.models.saving import save_model, save_pipeline
from versvideo.models.text import load_clip
from versvideo.models.vae import load_vae
from versvideo.pipelines.text_to_video import load_pipeline
from versvideo.world.classifier import ShapesNet
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
        if module.name != "__init__.py":
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
        copy_tree(source, ("settings.ini", "setup.py", "pyproject.toml", "README.md", "versvideo"))
        if (REPO / "versvideo/weights").exists():
            shutil.copytree(REPO / "versvideo/weights", source / "versvideo/weights")
        call(sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation",
             "--target", site, source, cwd=away)
        env = os.environ | {"PYTHONPATH": str(site)}
        ask = [sys.executable, "-c", "import versvideo; print(versvideo.__file__)"]
        where = subprocess.check_output(ask, cwd=away, env=env, text=True)
        assert Path(where.strip()).is_relative_to(site), f"tests would import {where.strip()}"
        tests = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider",
                 "-c", str(REPO / "pyproject.toml"), "--rootdir", str(REPO), str(REPO / "tests")]
        code = subprocess.run(tests, cwd=away, env=env).returncode
    if code:
        raise SystemExit(code)


def runs() -> None:
    "Every run notebook at its default parameters, which take seconds on a CPU, and some at others."
    notebooks = [(path,) for path in sorted((REPO / "nbs").glob("[2-6]?_*.ipynb"))]
    notebooks += [(REPO / "nbs/21_train_vae.ipynb", "stage=tcm", "perceptual=clip", *more)
                  for more in ((), ("without=tcm+refinement",))]
    notebooks += [(REPO / "nbs/23_train_style.ipynb", "model=XS", "stage=captions", "even=True",
                   "adapter=versvideo/weights/XS", "workers=1")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        own = MovingShapes.full("test", 0, frames=40, size=(90, 120)).batch([0]).clips[0]
        write_video(own / 127.5 - 1, Path(folder) / "own.mp4", fps=30)
        Image.fromarray(own[:, 0].permute(1, 2, 0).numpy()).save(Path(folder) / "own.png")
        notebooks += [(REPO / "nbs/32_edit.ipynb", f"video={folder}/own.mp4",
                       f"style={folder}/own.png", "steps=4")]

        def smoke(run: tuple) -> float:
            start, (notebook, *parameters) = time.monotonic(), run
            call(sys.executable, REPO / "tests/run_notebook.py", f"nbs/{notebook.name}",
                 Path(folder) / f"{len(parameters)}-{notebook.name}", *parameters, cwd=REPO,
                 OMP_NUM_THREADS="1")
            return time.monotonic() - start

        for run, seconds in zip(notebooks, pool.map(smoke, notebooks), strict=True):
            print(*(run[0].name, *run[1:]), f"{seconds:.0f} s", flush=True)
        for name in ("20_train_unet", "41_table2_ucf101"):
            two = Path(folder) / f"two-{name}"
            call(BIN / "torchrun", "--standalone", "--nproc_per_node", 2, "--no_python",
                 sys.executable, REPO / "tests/run_notebook.py", f"nbs/{name}.ipynb",
                 f"{two}.ipynb", f"out={two}", cwd=REPO, OMP_NUM_THREADS="1")
            assert Path(f"{two}.ipynb").exists() and read_json(two / "config.json")["processes"] == 2
            print(f"{name}.ipynb by two processes", flush=True)
        launched = Path(folder) / "launched"
        call(BIN / "accelerate", "launch", "--cpu", "--num_processes", 1, "--num_machines", 1,
             "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "versvideo.trainers.loop",
             "nbs/22_train_controlnet.ipynb", f"out={launched}", cwd=REPO, OMP_NUM_THREADS="1")
        assert read_json(launched / "metrics.json")["seconds"] > 0
        print("22_train_controlnet.ipynb by accelerate launch", flush=True)


def ship(unet: str, vae: str, image_vae: str, clip: str, classifier: str, control: str = "",
         style: str = "") -> None:
    """Put what was trained together as the pipeline that the package holds.

    UNET, CONTROL and STYLE are folders of pipelines, of which one part is taken; CLIP holds both
    towers. IMAGE_VAE, the autoencoder that the decoder of VAE was built around, and CLASSIFIER, that
    scores are computed on, lie beside.
    """
    shipped = REPO / "versvideo/weights/XS"

    def part(folder, name):
        return getattr(load_pipeline(folder, device="cpu"), name) if folder else None

    text_encoder, image_encoder, tokenizer = load_clip(REPO / clip)
    pipe = load_pipeline(unet, device="cpu")
    assert same(pipe.text_encoder, text_encoder), f"{unet} was trained on another text encoder"
    decoder, encoder = load_vae(REPO / vae), load_vae(REPO / image_vae)
    assert same(decoder.encoder, encoder.encoder), f"{vae} has another encoder than {image_vae}"
    assert same(decoder.encoder, pipe.vae.encoder), f"{unet} was trained on another encoder"
    pipe.register_modules(vae=decoder, image_encoder=image_encoder, tokenizer=tokenizer,
                          controlnet=part(control, "controlnet"),
                          style_adapter=part(style, "style_adapter"))
    save_pipeline(pipe, shipped)
    save_model(encoder, shipped / "image_vae")
    save_model(ShapesNet.from_pretrained(REPO / classifier), shipped / "classifier")
    print(f"{unet} -> {shipped.relative_to(REPO)}")


def again(run: str) -> None:
    "Execute a run of results/ again, in out/again, with the parameters of its record; compare."
    record = REPO / f"results/{run}.ipynb"
    if not record.exists():
        records = (REPO / "results").glob("**/*.ipynb")
        known = ", ".join(sorted(str(p.relative_to(REPO / "results").with_suffix("")) for p in records))
        raise SystemExit(f"ONLY={run!r} is not a run of results/: choose one of {known}")
    given = [c for c in nbformat.read(record, 4).cells
             if "injected-parameters" in c.metadata.get("tags", [])]
    values = {name: value for cell in given for name, value in defaults(cell.source).items()}
    values = {RENAMED_PARAMETERS.get(name, name): value for name, value in values.items()}
    new = REPO / "out/again" / run
    shutil.rmtree(new, ignore_errors=True)  # nothing is taken over from a run before
    values |= {"out": new} | ({"runs": new / "runs"} if values.get("runs") else {})
    processes = read_json(record.with_suffix("") / "config.json").get("processes", 1)
    torchrun = [BIN / "torchrun", "--standalone", "--nproc_per_node", processes, "--no_python"]
    command = [*(torchrun if processes > 1 else []), sys.executable,
               REPO / "tests/run_notebook.py", f"nbs/{record.stem.partition('-')[0]}.ipynb",
               new.with_suffix(".ipynb"), *(f"{name}={value}" for name, value in values.items())]
    env = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    if subprocess.run(list(map(str, command)), cwd=REPO, env=os.environ | env).returncode:
        raise SystemExit(1)
    before, after = (read_json(f / "metrics.json") for f in (record.with_suffix(""), new))
    report_drift({run: drifted(before, after)})


def drift(*runs: str) -> None:
    "Compare the numbers of runs, all of results/ by default, with those that were last committed."
    found = {}
    root = REPO / "results"
    for path in sorted([*root.glob("*/metrics.json"), *root.glob("[a-z]*/*/metrics.json")]):
        name = path.parent.relative_to(root).as_posix()
        if runs and name not in runs:
            continue
        shown = subprocess.run(["git", "show", f"HEAD:results/{name}/metrics.json"], cwd=REPO,
                               capture_output=True, text=True)
        if shown.returncode:
            print(f"{name}: not committed, nothing to compare with")
        else:
            found[name] = drifted(json.loads(shown.stdout), read_json(path))
    report_drift(found)


def readme() -> None:
    "Build the tables of the README from the records anew."
    path = REPO / "README.md"
    path.write_text(fill_tables(path.read_text()))


def report_drift(found: dict) -> None:
    "Print how many numbers of each run drifted; SystemExit naming them where some did."
    for run, changes in found.items():
        print(f"{run}: {len(changes) or 'no'} numbers drifted", flush=True)
    lines = [f"{run}: {name} was {old}, is {new}" for run, changes in found.items()
             for name, old, new in changes]
    if lines:
        raise SystemExit("\n".join(lines))


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    "Whether two models have equal weights, as half floats."
    first, second = (tensors_digest(t.half() for t in m.state_dict().values()) for m in (one, other))
    return first == second


if __name__ == "__main__":
    {"sync": sync, "installed": installed, "runs": runs, "ship": ship, "again": again,
     "drift": drift, "readme": readme}[sys.argv[1]](*sys.argv[2:])
