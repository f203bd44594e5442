"""Asking again for what may pass."""

import pytest

from registry import patience
from registry.patience import persist


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every pause that was made, on a clock that nothing else moves."""
    made: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", made.append)
    monkeypatch.setattr(patience.time, "monotonic", lambda: sum(made))
    return made


class Failing:
    """Fails so many times, then answers."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> str:
        self.left -= 1
        if self.left >= 0:
            raise ConnectionError(f"{self.left} left")
        return "answer"


def test_what_passes_is_asked_again(pauses: list[float]) -> None:
    assert persist(Failing(3), lambda _: True, 12) == "answer"
    assert len(pauses) == 3


def test_what_does_not_pass_is_told_at_once(pauses: list[float]) -> None:
    with pytest.raises(ConnectionError, match="2 left"):
        persist(Failing(3), lambda error: "1 left" in str(error), 12)
    assert pauses == []


def test_patience_ends(pauses: list[float]) -> None:
    failing = Failing(1000)
    with pytest.raises(ConnectionError):
        persist(failing, lambda _: True, 12)
    assert 6 < sum(pauses) <= 12
    assert len(pauses) < 15, "a server that is down is not asked all the time"


def test_no_patience_asks_once(pauses: list[float]) -> None:
    with pytest.raises(ConnectionError, match="4 left"):
        persist(Failing(5), lambda _: True, 0)
    assert pauses == []


def test_those_that_failed_together_do_not_ask_again_together(pauses: list[float]) -> None:
    for _ in range(5):
        persist(Failing(1), lambda _: True, 12)
    assert len(set(pauses)) == 5
