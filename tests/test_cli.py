"""The `versvideo` command, as a user meets it: in any folder, with one line for an error."""

import subprocess
import sys
import time

import pytest

from versvideo.media.video import read_video, write_video
from versvideo.world.shapes import MovingShapes


def versvideo(*arguments, cwd, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "versvideo", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, **options)


def test_generate_writes_a_video(tmp_path):
    done = versvideo("generate", "a red circle moving left", "-o", "out.mp4", "--steps", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "out.mp4"
    assert read_video(tmp_path / "out.mp4").shape == (3, 16, 256, 256)


def test_compare_names_the_cause_of_a_difference(tmp_path):
    "Two folders of videos, alike in all else: the clips are the only cause."
    for name, count, seed in (("real", 12, 0), ("a", 12, 1), ("b", 12, 2)):
        (tmp_path / name).mkdir()
        clips = MovingShapes("test", seed, frames=16, size=32).batch(range(count)).clips
        for i, clip in enumerate(clips):
            write_video(clip, tmp_path / name / f"{i}.mp4")
    form = ("--geometry", "32 as rendered", "-o", "gap.jpg")
    done = versvideo("compare", "a", "b", "--real", "real", *form, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "comes from clips (a and b)" in done.stdout and (tmp_path / "gap.jpg").exists()
    listed = versvideo("compare", "stylegan-v", "videogpt", cwd=tmp_path)
    assert "224 centre crop" in listed.stdout
    assert "did you mean 'latte'" in versvideo("compare", "latte", "lattee", cwd=tmp_path).stderr


def test_first_line_comes_before_torch(tmp_path):
    "The command says what it does before the imports that take seconds."
    code = ("import sys, versvideo.cli as c\n"
            "c.say = lambda text: sys.exit('torch' in sys.modules and 3 or 0)\n"
            "c.main(['generate', 'a star'])")
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_import_is_light(tmp_path):
    "`import versvideo` and the modules of the command need neither torch nor numpy."
    code = ("import sys, versvideo, versvideo.cli, versvideo.core.notebooks\n"
            "sys.exit(' '.join({'torch', 'numpy', 'diffusers', 'transformers'} & sys.modules.keys()) or 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_imported_when_asked_for():
    import versvideo
    assert {name for name in versvideo.__all__ if getattr(versvideo, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'load_pipelin'"):
        getattr(versvideo, "load_pipelin")  # noqa: B009


@pytest.mark.parametrize(("arguments", "message"), [
    (("generate", "a star", "-o", "star.avi"), "give a name that ends with .mp4, .gif or .webp"),
    (("generate", "a star", "--model", "XL", "-o", "a.mp4"), "XS"),
    (("generate", "a star", "--steps", "0"), "steps=0"),
    (("generate", "a star", "--fps", "0"), "fps=0"),
    (("generate", "a star", "--image", "none.png"), "none.png is not a file"),
    (("edit", "none.mp4", "a star"), "none.mp4 is not a file"),
    (("run", "30_generate", "--out", "done"), "ends with .ipynb"),
    (("run", "20_train_unet", "stepz=4"), "did you mean 'steps'"),
    (("run", "20_train_unte"), "there is no notebook 20_train_unte"),
    (("results", "again"), "results"),
])
def test_an_error_is_one_line(tmp_path, arguments, message):
    done = versvideo(*arguments, cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1 and lines[0].startswith("versvideo: ")
    assert message in lines[0]
    assert not list(tmp_path.glob("*.mp4"))


def test_wrong_options_are_one_line(tmp_path):
    done = versvideo("generate", "a star", "--steps", "many", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "many" in done.stderr


def test_a_model_loads_in_a_fresh_process(tmp_path):
    "diffusers loads parts only from modules that are imported: no other import may be needed."
    code = "from versvideo import load_pipeline; print(type(load_pipeline('XS').vae).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "TCMVAE", done.stderr


def test_help_is_quick(tmp_path):
    start = time.monotonic()
    done = versvideo("--help", cwd=tmp_path)
    assert done.returncode == 0 and "generate" in done.stdout
    assert time.monotonic() - start < 10  # far from the seconds that torch takes, on a busy machine too
