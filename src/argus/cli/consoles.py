"""Where the commands write: results to `out`, all else to `err`."""

from __future__ import annotations

from rich.console import Console

out = Console()
err = Console(stderr=True)
