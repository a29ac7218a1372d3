"""``python -m bench``: ``lamkernels bench`` from a checkout that is not installed, as on a borrowed GPU machine."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
