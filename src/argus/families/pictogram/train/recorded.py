"""A training step that a GPU records once and plays back.

Networks as small as these are done sooner than Python can ask for their next operation: played
back from a graph, a batch takes a tenth of the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from argus.families.pictogram.train.progress import plateau

WARM = 3  # steps before one is recorded
AVERAGING = 0.002  # how far the average follows at each step
COOLDOWN = 0.35  # the last share of the time, over which the rate falls
TOLD = 5  # steps between two looks at the clock
PLAN = 10_000  # of the time, for `plateau`


class Averages:
    """Exponential moving averages of networks' weights, from when they are begun."""

    def __init__(self, networks: nn.Module) -> None:
        self._own = [x for x in networks.state_dict().values() if x.is_floating_point()]
        self._means = [x.detach().clone() for x in self._own]

    @torch.no_grad()
    def begin(self) -> None:
        """Forget what was before."""
        for mean, own in zip(self._means, self._own, strict=True):
            mean.copy_(own)

    @torch.no_grad()
    def follow(self) -> None:
        torch._foreach_lerp_(self._means, self._own, AVERAGING)

    @torch.no_grad()
    def settle(self) -> None:
        """Give the networks their averages."""
        for own, mean in zip(self._own, self._means, strict=True):
            own.copy_(mean)


class Training:
    """Steps of AdamW on `loss_of`, which draws a batch of its own each time.

    `groups` are lists of parameters, each with its share of the rate.
    """

    def __init__(
        self,
        networks: nn.Module,
        groups: Sequence[tuple[list[nn.Parameter], float]],
        loss_of: Callable[[], Tensor],
        rate: float,
        device: torch.device,
    ) -> None:
        self._loss_of, self._rate, self._device = loss_of, rate, device
        self._trained = [one for parameters, _ in groups for one in parameters]
        self._shares = [share for _, share in groups]
        gpu = device.type == "cuda"
        self._optimiser = torch.optim.AdamW(
            [
                {"params": p, "lr": torch.tensor(rate * share, device=device)}
                for p, share in groups
            ],
            betas=(0.9, 0.99), weight_decay=1e-3, fused=True, capturable=gpu,
        )  # fmt: skip
        self._averages = Averages(networks)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros((), device=device)
        if gpu:
            self._record()

    def run(self, name: str, seconds: float, between: Callable[[], object]) -> int:
        """Take steps for `seconds`, leave in the networks the weights averaged over the last of
        them; how many steps. `between` is called now and then.

        Raises RuntimeError if the loss is no number any more.
        """
        begun, told, steps, passed = time.monotonic(), 0.0, 0, 0.0
        while passed < seconds or not steps:
            done = min(1.0, passed / seconds)
            if done < 1 - COOLDOWN:
                self._averages.begin()
            factor = plateau(round(PLAN * done), PLAN, PLAN // 100, COOLDOWN)
            for group, share in zip(self._optimiser.param_groups, self._shares, strict=True):
                group["lr"].fill_(factor * self._rate * share)
            for _ in range(TOLD if self._graph is not None else 1):
                self._step()
                steps += 1
            loss = self._loss.item()  # waits for the steps
            if not math.isfinite(loss):
                raise RuntimeError(f"{name}: after {steps} steps the loss is {loss}.")
            between()
            passed = time.monotonic() - begun
            if passed - told > 10 or passed >= seconds:
                told = passed
                print(f"{name}: {steps} steps in {passed:.0f} s, loss {loss:.4f}", flush=True)
        self._averages.settle()
        return steps

    def _step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._loss.copy_(self._computed())

    def _computed(self) -> Tensor:
        self._optimiser.zero_grad()
        loss = self._loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimiser.step()
        self._averages.follow()
        return loss.detach()

    def _record(self) -> None:
        """See https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        for group in self._optimiser.param_groups:
            group["lr"].fill_(0.0)
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                self._computed()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        self._optimiser.zero_grad()
        with torch.cuda.graph(graph):
            self._loss.copy_(self._computed())
        self._graph = graph
