"""`python -m bapq_edge` is the `bapq` command."""

import sys

from .cli import main

sys.exit(main())
