"""The virtual cache: of which topics a full run is kept."""

from __future__ import annotations

from collections import OrderedDict


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
