"""The model a server serves: where its weights are, and what marks its cached latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from argus.cache.scope import Scope
from argus.config import Settings
from argus.core.errors import ModelError
from argus.core.family import Family, Variant
from argus.core.profile import MAX_BATCH, Profile
from argus.engine.sources import fingerprint, model_folder, settled
from argus.families.catalog import default_family, find_family

PROFILE = "profile.json"


@dataclass(frozen=True)
class ServedModel:
    """A family's exact model. `id` names its weights, so that latents of others never match;
    `max_batch` is how many pictures it makes at once."""

    family: Family
    folder: Path
    id: str
    device: str
    dtype: str
    max_batch: int

    @classmethod
    def of(cls, settings: Settings) -> ServedModel:
        """Raises BadRequest and ModelError for settings that cannot be served."""
        family = default_family() if settings.family is None else find_family(settings.family)
        device, dtype = settled(settings.device, settings.dtype)
        name = family.exact.model
        folder = model_folder(family.models[name])
        most = settings.max_batch or _best_batch(settings, family, device)
        return cls(family, folder, f"{name}@{fingerprint(folder)}", device, dtype, most)

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


def _best_batch(settings: Settings, family: Family, device: str) -> int:
    """As many pictures at once as the profile finds worth it; the engine's limit without one.

    Raises ModelError for a profile that cannot be read or is of another family.
    """
    shipped = Path(family.folder) / PROFILE
    file = settings.profile or shipped
    if settings.profile is None and not shipped.is_file():
        return MAX_BATCH
    profile = Profile.read(file)
    model = profile.models.get(family.exact.model)
    if settings.profile is not None and (profile.family != family.name or model is None):
        raise ModelError(f"The profile {file} is of {profile.family!r}, not of {family.name!r}.")
    alike = str(profile.device["device"]).partition(":")[0] == device.partition(":")[0]
    return model.best_batch if model is not None and alike else MAX_BATCH
