"""Requests of a production service, read from GenTD26: who asks when, for how many pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from argus.control.variants import Flags, Numbers, Whole
from argus.core.errors import BadRequest

COLUMNS = ("at_s", "type", "user", "prompt_chars", "n", "model")
RUN_GAP_S = 1800.0  # as web analytics ends a session
DAY_S, HOUR_S = 86_400.0, 3600.0


@dataclass(frozen=True)
class RequestLog:
    """Requests (n,) in order of arrival, `at_s` seconds after a beginning, for `pictures` pictures
    each. Replayed by the simulator, and by whoever sends requests to a server.

    `run` numbers the runs, by first arrival: requests of one `user` with at most `RUN_GAP_S`
    between two. `again` says which ask for what the same run's request before them asked for.
    `span_s` is the time that the log covers.
    """

    at_s: Numbers
    pictures: Whole
    user: Whole
    run: Whole
    again: Flags
    span_s: float

    @property
    def mean_qpm(self) -> float:
        """Pictures a minute, in the mean."""
        return 60.0 * float(self.pictures.sum()) / self.span_s

    @cached_property
    def by_picture(self) -> Whole:
        """The request (p,) of every picture."""
        return np.repeat(np.arange(len(self.at_s)), self.pictures)

    def first(self, seconds: float) -> RequestLog:
        """The requests of the first so many seconds. Raises BadRequest if there are none."""
        kept = self.at_s < seconds
        if not kept.any():
            raise BadRequest(f"The trace has no request in its first {seconds / 60:g} minutes.")
        return RequestLog(
            self.at_s[kept], self.pictures[kept], self.user[kept], self.run[kept],
            self.again[kept], min(seconds, self.span_s),
        )  # fmt: skip

    def faster(self, times: float) -> RequestLog:
        """The same requests in the same order, so many times as fast: bursts stay bursts."""
        return RequestLog(
            self.at_s / times, self.pictures, self.user, self.run, self.again, self.span_s / times
        )

    def at_mean(self, qpm: float) -> RequestLog:
        """The log replayed at such a speed that it has `qpm` pictures a minute in the mean."""
        return self.faster(qpm / self.mean_qpm)

    def overlaid(self, copies: int, seed: int = 0) -> RequestLog:
        """As many logs at once, as of a service with so many times the users.

        Copy i begins i days later and up to an hour more, at random, so that days keep their hours
        and no two copies send at the same moments; what leaves the end comes in at the beginning.
        Gaps within runs stay as they are; bursts even out.
        """
        whole_s = np.ceil(self.span_s / DAY_S) * DAY_S if copies > 1 else self.span_s
        late_s = np.random.default_rng(seed).uniform(0, HOUR_S, copies)
        late_s[0] = 0.0
        shift_s = np.arange(copies) * DAY_S + late_s
        at_s = np.concatenate([(self.at_s + shift) % whole_s for shift in shift_s])
        order = np.argsort(at_s, kind="stable")

        def all_copies(values: Whole) -> Whole:
            apart = np.arange(copies)[:, None] * (values.max() + 1)
            together: Whole = (apart + values).ravel()[order]
            return together

        return RequestLog(
            at_s[order],
            np.tile(self.pictures, copies)[order],
            all_copies(self.user),
            _by_first(all_copies(self.run)),
            np.tile(self.again, copies)[order],
            float(whole_s),
        )


def read_log(file: Path) -> RequestLog:
    """The text-to-image requests of a GenTD26 table (CSV with at least the columns `COLUMNS`).

    Those that start from a picture are left out, as are those without a number of pictures, which
    never ran; those that failed arrived as well and stay. A request for which its user's request
    before, in the same run, had as long a prompt and the same model is taken to be for the same
    prompt. Raises BadRequest for a file that is no such table.
    """
    if not file.is_file():
        raise BadRequest(f"There is no file {file}: gentd26:FILE takes a table of GenTD26.")
    try:
        table = pd.read_csv(file)
    except ValueError as error:
        raise BadRequest(f"{file} is no CSV file: {error}") from None
    lacking = [name for name in COLUMNS if name not in table]
    if lacking:
        raise BadRequest(
            f"{file} has no column {', '.join(lacking)}: a table of GenTD26 has "
            f"{', '.join(COLUMNS)}."
        )
    table = table[(table["type"] == "text") & table["n"].notna()].reset_index(drop=True)
    if table.empty:
        raise BadRequest(f"{file} has no requests of type text.")
    for name, least in (("at_s", 0), ("prompt_chars", 0), ("n", 1)):
        table[name] = pd.to_numeric(table[name], errors="coerce")
        wrong = table[~(np.isfinite(table[name]) & (table[name] >= least))]
        if len(wrong):
            raise BadRequest(
                f"{file} has {name} {wrong[name].iloc[0]:g} in a text request of user "
                f"{wrong['user'].iloc[0]}: it must be a number of {least} or more."
            )
    table = table.sort_values("at_s", kind="stable")
    at_s = table["at_s"].to_numpy(float) - float(table["at_s"].iloc[0])
    if not at_s[-1]:
        raise BadRequest(f"All text requests of {file} come at once: it needs a span of time.")
    user = pd.factorize(table["user"])[0]
    runs = _runs(at_s, user)
    same = (
        table.groupby(runs)[["prompt_chars", "model"]].shift() == table[["prompt_chars", "model"]]
    )
    return RequestLog(
        at_s,
        table["n"].to_numpy().astype(np.int64),
        user,
        runs,
        same.all(axis=1).to_numpy(),
        float(at_s[-1]),
    )


def prompts_of(log: RequestLog, drawn: Whole) -> Whole:
    """The prompt (n,) of every request, of those `drawn` (n,) for each: a request that asks again
    gets the one of its run's request before it."""
    own = pd.Series(drawn).where(~log.again)
    prompts: Whole = own.groupby(log.run).ffill().fillna(pd.Series(drawn)).to_numpy(np.int64)
    return prompts


def _runs(at_s: Numbers, user: Whole) -> Whole:
    """The run (n,) of every request."""
    by_user = pd.Series(at_s).groupby(user)
    begins = ~(by_user.diff() <= RUN_GAP_S)  # the first of a user has no difference
    return _by_first(user * len(user) + begins.groupby(user).cumsum().to_numpy())


def _by_first(labels: Whole) -> Whole:
    """Numbers (n,) instead of labels, in order of first appearance."""
    numbers: Whole = pd.factorize(labels)[0]
    return numbers
