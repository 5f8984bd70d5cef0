"""Profiles: measured seconds on one device, by model and batch size."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from argus.core.errors import ModelError
from argus.core.family import Variant

MAX_BATCH = 32  # batch size without a profile


@dataclass(frozen=True)
class ModelProfile:
    """Measured seconds of one model, guidance included, at the family's picture size.

    `step_s` maps a batch size to the seconds of one denoising step of the whole batch, `decode_s`
    to those of decoding it. `encode_s` is for encoding one prompt, `picture_s` for compressing one
    picture as PNG. `load_s` is for loading with cold (`disk`) and with warm `page_cache`.
    `peak_bytes` is the peak memory of the measuring process, on the device if that is a GPU.
    """

    step_s: dict[int, float]
    decode_s: dict[int, float]
    encode_s: float
    picture_s: float
    load_s: dict[str, float]
    peak_bytes: int

    @property
    def best_batch(self) -> int:
        """The batch size past which larger ones gain no more than 3 % in pictures per second."""
        sizes = sorted(self.step_s)
        best = sizes[0]
        for size in sizes[1:]:
            if size / self.step_s[size] > 1.03 * best / self.step_s[best]:
                best = size
        return best

    def batch_step_s(self, batch: int) -> float:
        """Seconds of a step of `batch` pictures, linear between measured sizes."""
        return _between(self.step_s, batch)

    def batch_decode_s(self, batch: int) -> float:
        """Seconds of decoding `batch` pictures together."""
        return _between(self.decode_s, batch)

    def picture_cost_s(self, variant: Variant, batch: int) -> float:
        """Worker-seconds per picture at `batch`: c = steps run · s(b)/b + encode + decode(b)/b, a
        smaller picture's steps counting by its area."""
        denoise = variant.work_steps * self.batch_step_s(batch) / batch
        return denoise + self.encode_s + self.batch_decode_s(batch) / batch


@dataclass(frozen=True)
class Profile:
    """The models of a family on one device. `weights` are the fingerprints of their weights."""

    family: str
    device: dict[str, Any]
    width: int
    height: int
    weights: dict[str, str]
    models: dict[str, ModelProfile]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, file: Path) -> Profile:
        """Read a profile. Raises ModelError for a file that `argus profile` did not write."""
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ModelError(f"The profile {file} cannot be read: {error}") from error
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Profile:
        """The inverse of `to_json`. Raises ModelError for anything else."""
        try:
            models = {
                name: ModelProfile(
                    **{
                        **model,
                        "step_s": {int(b): s for b, s in model["step_s"].items()},
                        "decode_s": {int(b): s for b, s in model["decode_s"].items()},
                    }
                )
                for name, model in content["models"].items()
            }
            return cls(**{**content, "models": models})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"This is no profile as `argus profile` writes it: {error}") from error


def _between(measured: dict[int, float], batch: int) -> float:
    """A value at a batch size, linear between measured ones; in proportion past the largest."""
    sizes = sorted(measured)
    if batch >= sizes[-1]:
        return measured[sizes[-1]] * batch / sizes[-1]
    above = next(size for size in sizes if size >= batch)
    below = max((size for size in sizes if size <= batch), default=above)
    if above == below:
        return measured[above]
    share = (batch - below) / (above - below)
    return measured[below] + share * (measured[above] - measured[below])
