"""`python -m vramlab.gpu_check`, see `check`."""

import sys

from .check import main

sys.exit(main())
