"""`python -m vramlab.gpu_check`, see `check`."""

import sys

from .check import main

if __name__ == "__main__":
    sys.exit(main())
