"""Table 2 from end to end, on a made UCF-101: its folders, file names and split lists, and videos of four frames."""

import av
import numpy as np
import pytest
from accelerate.state import AcceleratorState
from processes import as_processes, ends

from versvideo.core.files import WEIGHTS
from versvideo.core.notebooks import run_cells
from versvideo.core.records import read_json
from versvideo.data.batches import LatentBatches
from versvideo.data.datasets import class_sentences
from versvideo.lab.study import training_folder
from versvideo.metrics.features import EXTRACTORS
from versvideo.metrics.networks import MeanColour

JUDGES = f"i3d=a,c3d=b,clip={WEIGHTS / 'XS'}"
VARIANTS = ("2D+1D, one FFN", "MEC", "experts", "both")


class Classes(MeanColour):
    "Stands for C3D: the mean colour as if it were the probabilities of three classes."

    def read(self, clips):
        found = super().read(clips)
        return found | dict(probabilities=(20 * found["features"]).softmax(1))


def write_avi(path, colour):
    "Five frames of 32x48, each a little brighter, as an AVI with MPEG-4."
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(5):
            frame = np.full((32, 48, 3), np.minimum(np.array(colour) + 4 * i, 255), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))


@pytest.fixture(scope="module")
def ucf(tmp_path_factory):
    "All 101 classes, a video of groups 1 (test) and 8 (train) in each, and the lists of the three splits."
    folder, colours = tmp_path_factory.mktemp("ucf"), np.random.default_rng(0)
    classes = sorted(class_sentences())
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, 1)))
    names = {group: [f"{name}/v_{name}_g{group:02d}_c01.avi" for name in classes] for group in (1, 8)}
    for split in (1, 2, 3):
        (lists / f"testlist0{split}.txt").write_text("".join(f"{name}\n" for name in names[1]))
        (lists / f"trainlist0{split}.txt").write_text(
            "".join(f"{name} {i}\n" for i, name in enumerate(names[8], 1)))
    for name in names[1] + names[8]:
        path = folder / "UCF-101" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_avi(path, colours.integers(0, 240, 3))
    return folder


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    "Files of I3D and C3D are not ours; processes are forked, so they have these too."
    monkeypatch.setitem(EXTRACTORS, "i3d", MeanColour)
    monkeypatch.setitem(EXTRACTORS, "c3d", Classes)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(processes, notebook, *arguments):
    "A run notebook in forked processes, as a launcher starts them."
    assert ends(as_processes(processes, run_cells, notebook, arguments)) == [0] * processes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("processes", [1, 2])
def test_prepare_train_generate_score_and_tabulate(tmp_path, ucf, processes):
    shards, out, table = tmp_path / "shards", tmp_path / "ablation", tmp_path / "table"
    run(processes, "26_prepare", f"data={ucf}", "per_shard=50", f"out={shards}")
    assert len(LatentBatches(shards, 1).shards) == 101
    only = VARIANTS if processes == 1 else VARIANTS[:2]
    run(processes, "50_ablation_unet", f"data={shards}", f"real={ucf}", f"judges={JUDGES}", "n=12", "steps=2",
        f"only={';'.join(only)}", f"out={out}")
    record, config = read_json(out / "metrics.json"), read_json(out / "config.json")
    assert list(record) == list(only) and config["processes"] == processes
    for row in record.values():
        assert {"error", "FVD", "IS", "FC", "cost"} <= row.keys()
        assert all(np.isfinite(row[name]["value"]) for name in ("error", "FVD", "IS", "FC"))
    assert "real clips begin at random frames" in config["protocols"]["FVD"]
    trained = {name: training_folder(out / "trainings" / "shards", name, 0) / "weights" for name in only}
    rows = ",".join(f"{name.partition(',')[0]}={folder}" for name, folder in trained.items())
    run(processes, "41_table2_ucf101", f"size={trained['MEC']}", f"data={ucf}", "preset=versvideo-ucf101-sentences",
        "n=12", "steps=2", "extractor=i3d", "weights=a", "classifier=c3d", "classifier_weights=b",
        f"clip={WEIGHTS / 'XS'}", f"baselines={rows}", f"out={table}")
    scores = read_json(table / "metrics.json")
    assert set(scores) == {"real", "ours", "2D+1D", *only[1:]}
    of = lambda name: {metric: score["value"] for metric, score in scores[name].items() if "FVD" in metric}
    assert of("MEC") == of("ours")
