"""The consoles of the commands: `out` for results, `err` for everything else."""

from __future__ import annotations

import os
import sys

from rich.console import Console

PAGE = 140  # columns for tables in files and pipes

out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PAGE)
err = Console(stderr=True)
