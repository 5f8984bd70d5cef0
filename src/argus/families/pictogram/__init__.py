"""The bundled family: small diffusion models of pictogram scenes, trained from scratch."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"  # a folder for each model
BASE = WEIGHTS / "base"
COMPONENTS = WEIGHTS / "components.safetensors"
