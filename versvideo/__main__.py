"""`python -m versvideo` is the `versvideo` command, also under torchrun and accelerate."""

import sys

from versvideo.cli import main

if __name__ == "__main__":
    sys.exit(main())
