"""Print the extra package index that `make install` uses: PIP_EXTRA_INDEX_URL, or PyTorch's own where a user wants it.

Ends with one line where an index does not answer; pip would warn for each package, again and again.
"""

import os
import platform
import shutil
import ssl
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

SMALL = "https://download.pytorch.org/whl/cpu"


def failure(url: str) -> str:
    "Why an index does not answer; empty where it does. Asked without the password that may be in its address."
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return ""
    try:
        urlopen(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl(), timeout=10).close()
    except HTTPError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return "" if isinstance(reason, ssl.SSLError) else str(reason)  # pip has certificates of its own
    return ""


def wants_cuda() -> bool:
    "Whether pip would download CUDA for a machine without an NVIDIA GPU."
    here = sys.platform == "linux" and platform.machine() == "x86_64" and not os.environ.get("PIP_NO_INDEX")
    gpu = shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()
    return here and not gpu and not list(Path(".venv").glob("lib/*/site-packages/torch"))


def offer() -> str:
    "Ask whether PyTorch without CUDA will do; where nobody can answer, say how to get it."
    print("There is no NVIDIA GPU here. PyTorch without CUDA is a download of 0.2 GB in place of several GB.",
          file=sys.stderr)
    if not sys.stdin.isatty():
        print(f"To have it, stop now and run: export PIP_EXTRA_INDEX_URL={SMALL}", file=sys.stderr)
        return ""
    print("Take it? [Y/n] ", end="", file=sys.stderr, flush=True)
    return "" if sys.stdin.readline().strip().lower().startswith("n") else SMALL


def main() -> None:
    given = os.environ.get("PIP_EXTRA_INDEX_URL", "")
    for url in given.split():
        if why := failure(url):
            sys.exit(f"PIP_EXTRA_INDEX_URL: {urlsplit(url).hostname} does not answer ({why}): correct or unset it")
    print(given or (offer() if wants_cuda() else ""))


if __name__ == "__main__":
    main()
