"""The bundled family: small diffusion models of pictogram scenes, trained from scratch."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"
BASE = _WEIGHTS / "base"
COMPONENTS = _WEIGHTS / "components.safetensors"
