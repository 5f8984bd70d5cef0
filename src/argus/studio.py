"""The Python API: load a model, make pictures, and see how they were made."""

from __future__ import annotations

import io
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from argus.core.errors import BadRequest
from argus.core.family import Variant
from argus.core.job import Job
from argus.families.catalog import list_families

if TYPE_CHECKING:
    from collections.abc import Callable

    from argus.engine.engine import Engine

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Picture:
    """A picture and how it was made. `seconds` is the time from prompt to picture."""

    image: Image.Image = field(repr=False)
    prompt: str
    negative_prompt: str
    model: str
    sampler: str
    seed: int
    steps: int
    guidance: float
    seconds: float

    def save(self, path: str | Path) -> None:
        """Save in the format of the path's suffix; a PNG also holds how it was made.

        Raises BadRequest for a suffix that is not a picture format.
        """
        path = Path(path)
        check_path(path)
        if path.suffix.lower() != ".png":
            self.image.save(path)
            return
        notes = PngImagePlugin.PngInfo()
        for name in ("prompt", "negative_prompt", "model", "sampler", "seed", "steps", "guidance"):
            notes.add_itxt(name, str(getattr(self, name)))
        self.image.save(path, pnginfo=notes)

    def _repr_png_(self) -> bytes:
        """The picture as a PNG, which notebooks show."""
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG")
        return buffer.getvalue()


def check_path(path: Path) -> None:
    """Raise BadRequest unless a picture can be saved at `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadRequest(f"{path} is not a picture: its name must end in {', '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"There is no folder {path.absolute().parent} to save {path.name} in.")


class Studio:
    """A loaded model with its family's settings for exact pictures."""

    def __init__(self, engine: Engine, model: str, settings: Variant) -> None:
        self._engine = engine
        self.model = model
        self.settings = settings

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        seed: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        width: int | None = None,
        height: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Picture:
        """Make a picture. Defaults are those of `settings`; the seed is drawn at random.

        `width` and `height` are pixels. `on_step(done, steps)` is called after every step.
        Raises BadRequest for settings the model cannot run, NotEnoughMemory when memory runs out.
        """
        ours = self.settings
        job = Job(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            steps=ours.steps if steps is None else steps,
            guidance=ours.guidance if guidance is None else guidance,
            width=ours.width if width is None else width,
            height=ours.height if height is None else height,
        )
        result = self._engine.run(job, on_step=on_step)
        return Picture(
            image=result.image,
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            model=self.model,
            sampler=ours.sampler,
            seed=job.seed,
            steps=job.steps,
            guidance=job.guidance,
            seconds=sum(result.timings_ms.values()) / 1000,
        )


def load(name: str, *, device: str | None = None, dtype: str | None = None) -> Studio:
    """Load a family by name (its exact variant), or a model from a folder or a hub id.

    `device` is "cpu", "cuda" or "cuda:N", by default CUDA where there is one. `dtype` is
    "float32", "float16" or "bfloat16", by default float32 on a CPU and float16 on CUDA.
    Raises BadRequest for a device or dtype that cannot be used, ModelError when there is no such
    model, NotEnoughMemory when it does not fit.
    """
    from argus.engine.engine import Engine  # here, because torch takes seconds to import
    from argus.engine.sources import settled

    device, dtype = settled(device, dtype)
    family = list_families().get(name)
    if family is not None:
        exact = family.exact
        engine = Engine.load(family.models[exact.model], device, dtype, exact.sampler)
        return Studio(engine, exact.model, exact)
    engine = Engine.load(name, device, dtype)
    width, height = engine.default_size
    return Studio(engine, name, Variant(name, "default", width, height, 50, 7.5))
