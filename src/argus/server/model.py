"""The model a server serves: where its weights are, and what marks its cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from argus.cache.scope import Scope
from argus.config import Settings
from argus.core.family import Family, Variant
from argus.engine.sources import fingerprint, model_folder, settled
from argus.families.catalog import default_family, find_family


@dataclass(frozen=True)
class ServedModel:
    """A family's exact model. `id` names its weights, so that latents of others never match."""

    family: Family
    folder: Path
    id: str
    device: str
    dtype: str

    @classmethod
    def of(cls, settings: Settings) -> ServedModel:
        """Raises BadRequest and ModelError for settings that cannot be served."""
        family = default_family() if settings.family is None else find_family(settings.family)
        device, dtype = settled(settings.device, settings.dtype)
        name = family.exact.model
        folder = model_folder(family.models[name])
        return cls(family, folder, f"{name}@{fingerprint(folder)}", device, dtype)

    @property
    def variants(self) -> dict[str, Variant]:
        """Those of the family's variants that are made with this model."""
        exact = self.family.exact
        return {
            name: variant
            for name, variant in self.family.variants.items()
            if (variant.model, variant.sampler) == (exact.model, exact.sampler)
        }

    def scope(
        self, namespace: str, width: int, height: int, guidance: float, negative_prompt: str
    ) -> Scope:
        """What latents of an exact run with these settings are kept under."""
        exact = self.family.exact
        return Scope(
            namespace, self.id, exact.sampler, width, height, exact.steps, guidance,
            negative_prompt,
        )  # fmt: skip
