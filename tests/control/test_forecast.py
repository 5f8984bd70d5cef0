from __future__ import annotations

import numpy as np
import pytest

from argus.control.forecast import Forecast


def test_a_steady_rate_is_forecast() -> None:
    forecast = Forecast(window_s=30)
    for count in np.random.default_rng(0).poisson(60, 50):
        forecast.add(int(count))
    assert forecast.next() == pytest.approx(2.0, rel=0.15)


def test_a_ramp_is_followed_by_its_trend() -> None:
    with_trend, without = Forecast(30), Forecast(30, beta=0.0)
    for count in range(300, 600, 10):
        with_trend.add(count)
        without.add(count)
    assert without.next() < with_trend.next() <= 620 / 30


def test_a_burst_is_taken_at_once_and_its_end_too() -> None:
    forecast = Forecast(30)
    for count in (60, 62, 58, 61):
        forecast.add(count)
    assert forecast.is_burst(40, 5.0)  # 8 a second where 2 were expected
    assert not forecast.is_burst(14, 5.0)
    forecast.add(240)
    assert forecast.next() == pytest.approx(8.0)
    forecast.add(60)
    assert forecast.next() == pytest.approx(2.0)


def test_a_window_that_took_longer_holds_more_requests_at_the_same_rate() -> None:
    forecast = Forecast(30)
    for _ in range(5):
        forecast.add(60)
    forecast.add(115, elapsed_s=58)
    assert forecast.next() == pytest.approx(2.0, rel=0.01)
