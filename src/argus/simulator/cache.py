"""Virtual caches: of which topics, or of which prompts, a full run is kept."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from argus.control.variants import Numbers


class VirtualCache:
    """Topics that were made in full, at most `capacity`; the one not used for longest goes first.

    A prompt has its neighbour while its topic is here. Only full runs fill it, so that a burst
    served by other models leaves new topics out.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._topics: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._topics)

    def has(self, topic: int) -> bool:
        """Whether a neighbour is there; it counts as used."""
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
    """Prompts that were made in full, as a real cache finds them: the nearest by embedding.

    `vectors` (p, d) are those of the prompts that will be asked for, `cached` (c, d) those that are
    there at the beginning; all of length 1. Nothing is evicted.
    """

    def __init__(self, vectors: Numbers, cached: Numbers) -> None:
        self._vectors, self._count = vectors, len(cached)
        self._cached = np.empty((len(cached) + len(vectors), vectors.shape[1]), vectors.dtype)
        self._cached[: len(cached)] = cached
        self._has = np.zeros(len(vectors), bool)

    def nearest(self, prompt: int) -> float:
        """The similarity of the nearest, NaN if nothing is cached."""
        if not self._count:
            return float("nan")
        return float((self._cached[: self._count] @ self._vectors[prompt]).max())

    def add(self, prompt: int) -> None:
        if not self._has[prompt]:
            self._has[prompt] = True
            self._cached[self._count] = self._vectors[prompt]
            self._count += 1
