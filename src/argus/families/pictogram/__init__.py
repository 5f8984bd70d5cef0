"""The bundled family: a small diffusion model of pictogram scenes, trained from scratch."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
