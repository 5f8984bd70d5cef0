"""Opens the cache and the folder of pictures that the settings name."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import Catalogue
from argus.cache.disk_tier import DiskTier
from argus.cache.latents import LatentStore, is_local
from argus.config import Settings, without_passwords
from argus.core.errors import BadRequest
from argus.server.pictures import PictureStore


def catalogue_url(settings: Settings) -> str:
    """The URL of the catalogue's database, which also has the samples."""
    data = settings.data.absolute()
    return settings.cache_catalogue or f"sqlite:///{data / 'catalogue.db'}"


def open_cache(settings: Settings, serving: bool = False) -> ApproximateCache:
    """The cache in the settings' data folder, or at the URLs that they give.

    A server that is `serving` also has what only one process may use: the file of the similarity
    index and the disk tier. Raises BadRequest when catalogue or latents cannot be opened.
    """
    data = settings.data.absolute()
    latents_url = settings.cache_latents or str(data / "latents")
    try:
        data.mkdir(parents=True, exist_ok=True)
        catalogue = Catalogue(catalogue_url(settings))
    except (OSError, SQLAlchemyError) as error:
        where = without_passwords(settings.cache_catalogue or f"in {data}")
        raise BadRequest(f"The cache's catalogue {where} cannot be opened: {error}") from error
    try:
        disk = None
        if serving and settings.cache_disk and not is_local(latents_url):
            disk = DiskTier(data / "latents-near", settings.cache_disk)
        store = LatentStore(latents_url, catalogue.id, disk)
    except (OSError, ValueError, ImportError) as error:
        advice = ""
        if isinstance(error, ImportError) and latents_url.startswith("s3"):
            advice = ": pip install 'argus-t2i[s3]'"
        raise BadRequest(
            f"The cache's latents at {without_passwords(latents_url)} cannot be opened: "
            f"{error}{advice}"
        ) from error
    index_file = data / "similarity.index" if serving else None
    return ApproximateCache(catalogue, store, settings.cache_limit, index_file=index_file)


def open_pictures(folder: Path, ttl_s: float) -> PictureStore:
    """The store of pictures in a folder. Raises BadRequest when the folder cannot be used."""
    try:
        return PictureStore(folder, ttl_s)
    except OSError as error:
        raise BadRequest(f"The pictures' folder {folder} cannot be opened: {error}") from error
