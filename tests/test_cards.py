"""The cards of the sets of data are such as the Hugging Face Hub reads."""

from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

CARDS = sorted((Path(__file__).resolve().parents[1] / "data_cards").glob("*.md"))
TASKS = {"text-to-video", "text-to-image", "video-classification", "video-text-to-text"}
SIZES = {"10K<n<100K", "1M<n<10M", "10M<n<100M", "1B<n<10B", "n>1T"}
LICENSES = {"apache-2.0", "unknown", "other"}  # "other" has a name


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_front_matter(path):
    card = DatasetCard(path.read_text(encoding="utf-8"))
    data = card.data.to_dict()
    assert data["license"] in LICENSES and ("license_name" in data) == (data["license"] == "other")
    assert set(data["task_categories"]) <= TASKS and data["task_categories"]
    assert set(data["size_categories"]) <= SIZES and len(data["size_categories"]) == 1
    assert set(data["language"]) <= {"en", "multilingual"} and data["language"]
    assert card.text.lstrip().startswith(f"# {data['pretty_name']}\n")


def test_there_are_cards():
    assert len(CARDS) >= 7
