"""Virtual caches: the topics, or the prompts, of which a full run is cached."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from argus.control.variants import Numbers


class VirtualCache:
    """Topics with a full run, at most `capacity`; the least recently used one is evicted.

    A prompt has its neighbour while its topic is cached. Only full runs fill the cache, so that a
    burst served by other models leaves new topics out.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._topics: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._topics)

    def has(self, topic: int) -> bool:
        """Whether a neighbour is cached; it counts as used."""
        if topic not in self._topics:
            return False
        self._topics.move_to_end(topic)
        return True

    def add(self, topic: int) -> None:
        self._topics[topic] = None
        self._topics.move_to_end(topic)
        if len(self._topics) > self._capacity:
            self._topics.popitem(last=False)


class SimilarityCache:
    """Prompts with a full run, found by embedding as in the server's cache. Nothing is evicted.

    `vectors` (p, d) are the embeddings of the prompts to come, `cached` (c, d) those cached at the
    beginning; all of length 1.
    """

    def __init__(self, vectors: Numbers, cached: Numbers) -> None:
        self._vectors, self._count = vectors, len(cached)
        self._cached = np.empty((len(cached) + len(vectors), vectors.shape[1]), vectors.dtype)
        self._cached[: len(cached)] = cached
        self._has = np.zeros(len(vectors), bool)

    def nearest(self, prompt: int, count: int) -> Numbers:
        """The embeddings (n, d) of the nearest cached prompts, nearest first, at most `count`."""
        cached = self._cached[: self._count]
        apart = -(cached @ self._vectors[prompt])
        some = np.arange(len(cached))
        if len(cached) > count:
            some = np.argpartition(apart, count)[:count]
        return cached[some[np.argsort(apart[some], kind="stable")]]

    def add(self, prompt: int) -> None:
        if not self._has[prompt]:
            self._has[prompt] = True
            self._cached[self._count] = self._vectors[prompt]
            self._count += 1
