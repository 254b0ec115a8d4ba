"One thread of torch, said before it is imported: some tests fork, and a child finds no threads there."

import os

os.environ["OMP_NUM_THREADS"] = "1"
