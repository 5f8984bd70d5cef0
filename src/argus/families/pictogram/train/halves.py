"""Gradients of a batch in chunks, one thread each, with plain attention.

On a CPU that others use too, chunks that never wait for one another are up to twice as fast as
threads that share every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Halves:
    """Computes gradients with one chunk of the batch on each of `count` threads."""

    def __init__(self, parameters: Sequence[nn.Parameter], count: int) -> None:
        self.count = count
        self._parameters = list(parameters)
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """Leave the gradients of the mean loss in the parameters; the mean loss.

        Gradients keep the memory format of their parameters, without which a fused optimiser
        takes one for another.
        """
        done = list(self._pool.map(self._gradients, losses))
        share = 1 / len(done)
        for i, parameter in enumerate(self._parameters):
            total = done[0][1][i]
            for _, others in done[1:]:
                total.add_(others[i])
            total.mul_(share)
            if total.stride() != parameter.stride():
                total = torch.empty_like(parameter).copy_(total)
            parameter.grad = total
        return sum(loss for loss, _ in done) * share

    def _gradients(self, loss_of: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
        loss = loss_of()
        gradients = torch.autograd.grad(
            loss, self._parameters, allow_unused=True, materialize_grads=True
        )
        return loss.item(), list(gradients)
