"""Jobs in flight, and the step that advances a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from argus.core.job import Job
from argus.engine.conditioning import Conditioning, Rows, rows_of
from argus.engine.forward import Forward
from argus.engine.schedules import Schedule, Step
from argus.engine.transfer import to_device, to_host

OnStep = Callable[[int, int], None]
OnPreview = Callable[[int, Image.Image], None]


@dataclass(eq=False)
class Slot:
    """A job in flight: its latents (1, c, h, w), its place in its schedule, its latents to return.

    `done` counts the steps so far, skipped ones included. `x0` is the latest estimate of the
    finished latents, None before the first step that runs; after each number of steps in
    `previews`, a picture of it goes to `on_preview`.
    """

    job: Job
    schedule: Schedule
    conditioning: Conditioning
    generator: torch.Generator
    latents: Tensor
    keep: frozenset[int] = frozenset()
    on_step: OnStep | None = None
    previews: tuple[int, ...] = ()
    on_preview: OnPreview | None = None
    done: int = 0
    x0: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.done == self.job.steps

    @property
    def step(self) -> Step:
        """The next step."""
        schedule = self.schedule
        return (schedule.alone if self.x0 is None else schedule.steps)[self.done]


class Denoiser:
    """Advances slots of one picture size. The batch's conditioning is laid out once and kept while
    the same slots step together."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._members: tuple[Slot, ...] = ()
        self._rows: Rows | None = None

    def advance(self, slots: Sequence[Slot]) -> None:
        """One step of every slot: one forward pass, then each sampler's own update.

        If it raises, the slots are unchanged.
        """
        noisy = [slot.generator for slot in slots if slot.schedule.noisy]
        states = [generator.get_state() for generator in noisy]
        try:
            moved, x0 = self._moved(slots)
            kept = [
                to_host(moved[i : i + 1]) if slot.done + 1 in slot.keep else None
                for i, slot in enumerate(slots)
            ]
        except BaseException:
            for generator, state in zip(noisy, states, strict=True):
                generator.set_state(state)
            raise
        for i, slot in enumerate(slots):
            slot.latents, slot.x0 = moved[i : i + 1], x0[i : i + 1]
            slot.done += 1
            latents = kept[i]
            if latents is not None:
                slot.kept[slot.done] = latents

    def _moved(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        """The slots' next latents (b, c, h, w), and their estimates x₀ of the finished ones."""
        steps = [slot.step for slot in slots]
        rows = self._laid_out(tuple(slots))
        x = torch.cat([slot.latents for slot in slots]).float()
        numbers = _columns(steps, self._forward.device)
        guess = self._guess(x, numbers["scale"], steps, rows)
        x0 = _clipped(numbers["x0_x"] * x + numbers["x0_out"] * guess, slots)
        moved = numbers["x"] * x + numbers["out"] * guess + numbers["x0"] * x0
        if any(step.last for step in steps):
            last = [x0[i : i + 1] if s.x0 is None else s.x0 for i, s in enumerate(slots)]
            moved += numbers["last"] * torch.cat(last)
        if any(slot.schedule.noisy for slot in slots):
            moved += numbers["noise"] * torch.cat([self._noise(slot) for slot in slots])
        return moved.to(self._forward.dtype), x0

    def _guess(self, x: Tensor, scale: Tensor, steps: Sequence[Step], rows: Rows) -> Tensor:
        """The model's output (b, c, h, w) in float32, guidance applied."""
        n, guided = len(x), len(rows.guided)
        inputs = (x * scale).to(self._forward.dtype)
        times = to_device(torch.tensor([step.timestep for step in steps]), self._forward.device)
        if guided:
            inputs = torch.cat([inputs, inputs if guided == n else inputs[rows.guided]])
            times = torch.cat([times, times if guided == n else times[rows.guided]])
        out = self._forward(inputs, times, rows.states, rows.added, rows.guidance_embedding)
        if not guided:
            return out
        positive, negative = out[:n], out[n:]
        if guided == n:
            return negative + rows.guidance * (positive - negative)
        mixed = negative + rows.guidance * (positive[rows.guided] - negative)
        return positive.index_copy(0, rows.guided, mixed)

    def _laid_out(self, slots: tuple[Slot, ...]) -> Rows:
        if self._rows is None or slots != self._members:
            self._rows = rows_of([s.job for s in slots], [s.conditioning for s in slots])
            self._members = slots
        return self._rows

    def _noise(self, slot: Slot) -> Tensor:
        """The noise (1, c, h, w) of the slot's sampler after a step; 0 if it draws none."""
        if not slot.schedule.noisy:
            return torch.zeros_like(slot.latents, dtype=torch.float32)
        noise: Tensor = randn_tensor(
            tuple(slot.latents.shape), slot.generator, self._forward.device, self._forward.dtype
        )
        return noise.float()


def _columns(steps: Sequence[Step], device: torch.device) -> dict[str, Tensor]:
    """Every factor of the steps as a (b, 1, 1, 1) tensor."""
    names = ("scale", "x0_x", "x0_out", "x", "out", "x0", "last", "noise")
    table = torch.tensor([[getattr(step, name) for step in steps] for name in names])
    table = to_device(table, device)
    return {name: table[i].view(-1, 1, 1, 1) for i, name in enumerate(names)}


def _clipped(x0: Tensor, slots: Sequence[Slot]) -> Tensor:
    clips = [slot.schedule.clip for slot in slots]
    if not any(clip is not None for clip in clips):
        return x0
    limits = [float("inf") if clip is None else clip for clip in clips]
    limit = to_device(torch.tensor(limits), x0.device).view(-1, 1, 1, 1)
    return x0.clamp(-limit, limit)
