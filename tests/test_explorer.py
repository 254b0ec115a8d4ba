"The explorer in a real JupyterLab in a real browser: a clip is generated, seen and saved."

import importlib.util
import os
import subprocess
import sys

import pytest
from browser import CHROMIUM, DRIVER, answers, browser, stop, until
from nbformat import v4, write
from processes import free_port

from versvideo.media.video import read_video, write_video
from versvideo.world.shapes import MovingShapes

MISSING = [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER),
                                    ("jupyterlab", importlib.util.find_spec("jupyterlab"))) if not found]
SETUP = """
from datetime import datetime
from pathlib import Path
from versvideo import load_pipeline
from versvideo.pipelines.explorer import explore
explorer = explore(load_pipeline("XS"), "saved")
explorer.prompt.steps.value = 3
explorer.conditions.video.value = ({"name": "my.mp4", "type": "", "size": 1, "last_modified": datetime.now(),
                                    "content": memoryview(Path("my.mp4").read_bytes())},)
explorer.conditions.scales["softedge"].value = 1
"""
PICTURES = "[...document.querySelectorAll('.widget-image')].filter(i => i.offsetParent)"
TEXT = "document.querySelector('.jp-NotebookPanel').innerText"


@pytest.fixture
def lab(tmp_path):
    "Address of a JupyterLab on a folder with a notebook and a video, without a password."
    kernel = dict(name="python3", display_name="Python 3", language="python")
    notebook = v4.new_notebook(cells=[v4.new_code_cell(SETUP + "explorer")], metadata=dict(kernelspec=kernel))
    write(notebook, tmp_path / "try.ipynb")
    write_video(MovingShapes("test", size=(64, 64), frames=16).batch([0]).clips[0], tmp_path / "my.mp4")
    home, port = tmp_path / "home", free_port()
    env = os.environ | {name: str(home) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR",
                                                     "IPYTHONDIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    with open(tmp_path / "said.txt", "w") as said:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=said, stderr=said)
    try:
        until(lambda: answers(f"http://127.0.0.1:{port}/api"), 120, (tmp_path / "said.txt").read_text)
        yield f"http://127.0.0.1:{port}/lab/tree/try.ipynb"
    finally:
        stop(server)


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_clip_is_generated_seen_and_saved(lab, tmp_path):
    with browser(tmp_path / "profile") as page:
        page.call("url", url=lab)
        page.wait("document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'")
        page.click("//*[contains(@class, 'jp-Notebook-cell')]")
        page.click("//*[@data-command='notebook:run-cell-and-select-next']")
        page.wait("document.querySelector('.widget-button')")
        assert page.script(f"return {PICTURES}.length") == 0
        assert "Explorer object" not in page.script(f"return {TEXT}")
        page.click("//button[contains(., 'generate')]")
        widths = page.wait(f"{PICTURES}.length == 2 && {PICTURES}.map(i => i.naturalWidth)")
        assert all(widths), "a broken picture"
        page.click("//button[contains(., 'save')]")
        page.wait(f"{TEXT}.includes('saved as ')")
    assert read_video(tmp_path / "saved" / "explored-1.mp4").shape == (3, 16, 256, 256)
