import pytest

from argus.core.errors import BadRequest
from argus.core.job import Job


def test_a_job_that_skips_runs_the_rest_of_its_steps() -> None:
    assert Job("a red fish", steps=30, skip=10).steps_run == 20


def test_guidance_of_one_or_less_is_no_guidance() -> None:
    assert not Job("a red fish", guidance=1.0).guided
    assert Job("a red fish", guidance=1.5).guided


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"steps": 0}, "steps is 0; it must be from 1"),
        ({"steps": 10, "skip": 10}, "less than steps"),
        ({"skip": -1}, "skip is -1"),
        ({"seed": -3}, "seed is -3"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 1.0, "negative_prompt": "fog"}, "no effect at guidance 1"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_a_job_that_cannot_be_says_what_would_be_right(
    wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        Job(**{"prompt": "a red fish", **wrong})  # type: ignore[arg-type]
