"One thread of torch, said before it is imported: some tests fork, and a child finds no threads there."

import os

os.environ["OMP_NUM_THREADS"] = "1"

SLOW = ("test_trainers", "test_ucf101", "test_unet", "test_vae")  # First, so that no process is left alone with one


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOW)
