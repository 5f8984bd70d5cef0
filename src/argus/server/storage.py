"""Opens the cache and the folder of pictures that the settings name."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.latents import LatentStore
from argus.config import Settings, without_passwords
from argus.core.errors import BadRequest
from argus.server.pictures import PictureStore


def catalogue_url(settings: Settings) -> str:
    """The URL of the catalogue's database, which also has the samples."""
    data = settings.data.absolute()
    return settings.cache_catalogue or f"sqlite:///{data / 'catalogue.db'}"


def open_cache(settings: Settings) -> ApproximateCache:
    """The cache in the settings' data folder, or at the URLs that they give.

    Raises BadRequest when catalogue or latents cannot be opened.
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
    return ApproximateCache(
        catalogue, store, settings.cache_limit, index_file=data / "similarity.index"
    )


def open_pictures(folder: Path, ttl_s: float) -> PictureStore:
    """The store of pictures in a folder. Raises BadRequest when the folder cannot be used."""
    try:
        return PictureStore(folder, ttl_s)
    except OSError as error:
        raise BadRequest(f"The pictures' folder {folder} cannot be opened: {error}") from error
