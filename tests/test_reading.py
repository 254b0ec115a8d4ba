"""Videos as ffmpeg shows them, in bounded memory, under any name."""

import os
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest

from versvideo.data.entries import find_media
from versvideo.data.tables import read_beside
from versvideo.lab.awkward import awkward_files, encode, grey_frames
from versvideo.media.video import read_clip, read_folder, read_video, write_video


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict:
    return {file.path.name: file for file in awkward_files(tmp_path_factory.mktemp("awkward"))}


def by_ffmpeg(path, shape) -> np.ndarray:
    "What ffmpeg's command-line tool makes of a file, brought to square pixels and a size `h w`."
    h, w = shape
    command = ["ffmpeg", "-v", "error", "-i", path, "-vf", f"scale={w}:{h}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    out = subprocess.run(command, capture_output=True, check=True).stdout
    return np.frombuffer(out, np.uint8).reshape(-1, h, w, 3)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg's command-line tool is not installed")
def test_every_kind_of_file_is_read_as_ffmpeg_reads_it(files):
    for name, file in files.items():
        ours = read_video(file.path).permute(1, 2, 3, 0).numpy()
        theirs = by_ffmpeg(file.path, ours.shape[1:3])
        assert ours.shape == theirs.shape, name
        assert np.abs(ours.astype(int) - theirs).mean() < 1, name


def test_the_first_frame_of_the_file_gives_size_and_turn(files):
    resized = files["resized.ts"].path
    whole = read_video(resized)
    for choice in (dict(frames=1), dict(frames=1, stride=1, start=0.9), dict(frames=2, stride=3, start=0.5)):
        assert read_video(resized, **choice).shape[2:] == whole.shape[2:]
    assert read_video(resized, 1, 1, start=0.9).equal(whole[:, 7:])


def test_a_long_last_frame_is_shown_to_its_end(tmp_path):
    times = [0, 1, 2, 3, 11]
    film = encode(tmp_path / "slow.mkv", {("libx264", 0): grey_frames(range(5))}, times=times)
    assert read_video(film, fps=8).shape[1] == 12


def test_a_frame_for_every_moment_where_times_are_mended(files):
    for name in ("again.ts", "leap.ts", "raw.h264", "holes.avi"):
        assert read_video(files[name].path, fps=8).shape[1] == len(files[name].frames), name


def test_decord_gives_the_same_frames_or_says_why_not(files, monkeypatch):
    pytest.importorskip("decord")
    plain = encode(files["turned.mp4"].path.with_name("grey.mp4"), {("libx264", 0): grey_frames(range(24))})
    monkeypatch.setenv("VERSVIDEO_READER", "decord")
    assert read_video(plain).equal(read_video(plain, reader="pyav"))
    assert read_clip(plain, (8, 32, 32)).equal(read_clip(plain, (8, 32, 32), reader="pyav"))
    refused = set()
    for name, file in files.items():
        try:
            assert read_video(file.path).equal(read_video(file.path, reader="pyav")), name
        except ValueError as error:
            assert name in str(error) and "leave reader='decord' out" in str(error)
            refused.add(name)
    assert {*files} - refused == {"turned.mp4", "upside-down.mp4", "cover.mkv", "tracks.mp4"}


MEASURE = """
import resource, sys
import torch
torch.set_num_threads(1)
from versvideo.data.facts import file_facts
from versvideo.media.pixels import cover
from versvideo.media.video import read_clip
cover(torch.zeros(3, 1, 64, 64, dtype=torch.uint8), (32, 32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
read_clip(sys.argv[1], (16, 256, 256)) if sys.argv[2] == "clip" else file_facts(sys.argv[1])
print((peak() - before) // 1024)
"""


def test_memory_depends_neither_on_length_nor_on_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (68, 120, 3), np.uint8)
    large = noise.repeat(32, 0).repeat(32, 1)[:2160]  # 3840 pixels wide
    film = noise.repeat(16, 0).repeat(16, 1)[:1080]
    clip = encode(tmp_path / "4k.mp4", {("libx264", 0): [large] * 16}, preset="ultrafast")  # 400 MB as pixels
    long = encode(tmp_path / "long.mp4", {("libx264", 0): [film] * 80}, preset="ultrafast")  # 500 MB as pixels
    for path, what in ((clip, "clip"), (long, "facts")):
        command = [sys.executable, "-c", MEASURE, str(path), what]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(done.stdout) < 300, (what, done.stdout)


def test_names_of_every_kind(tmp_path):
    source = encode(tmp_path / "source.mp4", {("libx264", 0): grey_frames(range(4))})
    names = ["12:30:45.mp4", "-dash.mp4", "a b.MP4", "emoji 🎈.mp4", "cafe\u0301.mp4", "b" * 251 + ".mp4", "100%d.mp4"]
    folder = tmp_path / "named"
    folder.mkdir()
    for name in names:
        shutil.copy(source, folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "._a b.MP4").write_bytes(b"Mac OS X")
    (folder / "._a b.txt").write_bytes(b"Mac OS X")
    here = os.getcwd()
    os.chdir(folder)
    try:
        for name in names:
            assert read_video(name).shape == (3, 4, 64, 64), name
    finally:
        os.chdir(here)
    assert sorted(read_folder(folder, 4, (32, 32)).names) == sorted(names)
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "far").symlink_to(folder)
    assert [entry.captions for entry in read_beside(linked)] == [(f"caption of {p.name}".replace("e\u0301", "é"),)
                                                                 for p in find_media(linked)]
    with pytest.raises(ValueError, match="no video in it"):
        read_video(encode_song(tmp_path / "song.mp4"))


def encode_song(path):
    "A file whose only video is a cover picture."
    with av.open(str(path), "w") as file:
        cover = file.add_stream("mjpeg", rate=8)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        file.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        file.mux(cover.encode())
    return path


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg's command-line tool is not installed")
def test_written_colours_are_right_for_who_reads_the_tags(tmp_path):
    import torch

    for height in (64, 720):
        red = torch.zeros(3, 2, height, 64)
        red[0] = 1
        shown = by_ffmpeg(write_video(red, tmp_path / "red.mp4"), (height, 64))[0, height // 2, 32]
        assert np.abs(shown.astype(int) - (255, 0, 0)).max() <= 3, (height, shown)
