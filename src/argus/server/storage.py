"""Opens the cache that the settings name."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.latents import LatentStore
from argus.config import Settings, without_passwords
from argus.core.errors import BadRequest


def catalogue_url(settings: Settings) -> str:
    """Where the catalogue is, and with it what was measured of served pictures."""
    data = settings.data.absolute()
    return settings.cache_catalogue or f"sqlite:///{data / 'catalogue.db'}"


def open_cache(settings: Settings) -> ApproximateCache:
    """The cache in the settings' data folder, or wherever they say.

    Raises BadRequest when catalogue or latents cannot be opened there.
    """
    data = settings.data.absolute()
    latents_url = settings.cache_latents or str(data / "latents")
    try:
        data.mkdir(parents=True, exist_ok=True)
        catalogue = Catalogue(catalogue_url(settings))
    except (OSError, SQLAlchemyError, ImportError) as error:
        raise BadRequest(f"The cache's catalogue in {data} cannot be opened: {error}") from error
    try:
        store = LatentStore(latents_url, catalogue.id)
    except (OSError, ValueError, ImportError) as error:
        raise BadRequest(
            f"The cache's latents at {without_passwords(latents_url)} cannot be opened: {error}"
        ) from error
    return ApproximateCache(catalogue, store, settings.cache_limit)
