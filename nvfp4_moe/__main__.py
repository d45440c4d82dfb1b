"""python -m nvfp4_moe: the same as the command nvfp4."""

import sys

from .cli import main

sys.exit(main())
