import re
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from octvideo.engine import meeting
from octvideo.engine.meeting import DistributedError, Meeting
from octvideo.files import HOST

CLOSED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:7. This is typical."
)


def meetings(size: int) -> list[Meeting]:
    """Ranks of one process, which have met."""
    store = dist.HashStore()
    ranks = [Meeting(store, store, rank=rank, size=size) for rank in range(size)]
    threads = [threading.Thread(target=rank.open, args=(timedelta(seconds=20),)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


@pytest.mark.parametrize(
    ("notes", "answers", "text"),
    [
        ({0: "waits for other ranks", 2: "failed: OSError: disk"}, {0: "a.py:1"}, "rank 2 on c failed: OSError: disk"),
        ({0: "waits for other ranks"}, {0: "a.py:1", 1: "b.py:2, f"}, "no answer from rank 2 on c:"),
        ({}, {0: "waits for other ranks"}, "no answer from rank 1 on b, rank 2 on c:"),
        (
            {0: "waits for other ranks"},
            {1: "waits for other ranks", 2: "b.py:2, f"},
            "did not join the other ranks: rank 2 on c (at b.py:2, f)",
        ),
        ({0: "waits for other ranks"}, {1: "waits for other ranks", 2: "waits for other ranks"}, "check the network"),
    ],
)
def test_who_is_named(notes: dict[int, str], answers: dict[int, str], text: str) -> None:
    store = dist.HashStore()
    rank = Meeting(store, store, rank=0, size=3)
    rank.hosts = ["a", "b", "c"]
    assert text in rank._judge(notes, answers)


def test_many_ranks_are_counted() -> None:
    rank = Meeting(dist.HashStore(), dist.HashStore(), rank=0, size=100)
    assert rank.names(range(50)).endswith("rank 19 and 30 more")


def test_the_place_of_a_thread_is_the_last_line_of_ours_or_that_it_waits_for_other_ranks() -> None:
    place = meeting._place(threading.current_thread())
    assert re.fullmatch(r".*/meeting.py:\d+, _place", place) or place == meeting._WAITS
    ended = threading.Event()

    def wait_long() -> None:
        ended.wait(20)

    thread = threading.Thread(target=wait_long)
    thread.start()
    time.sleep(0.05)
    try:
        assert meeting._place(thread) != meeting._WAITS
    finally:
        ended.set()
        thread.join()


def test_an_explanation_is_short_and_all_ranks_get_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ANSWER_S", 1.5)
    first, second, failed = meetings(3)
    failed.report(OSError("no space left"))
    for rank in (first, second):
        text = str(rank.explain(RuntimeError(CLOSED)))
        assert text == f"rank 2 on {HOST} failed: OSError: no space left (Connection closed by peer [::1]:7)"


def test_only_errors_of_collectives_are_explained() -> None:
    assert meeting.is_of_ranks(RuntimeError(CLOSED)) and meeting.is_of_ranks(dist.DistBackendError("NCCL"))
    others: list[BaseException] = [RuntimeError("size mismatch"), ValueError(CLOSED), KeyboardInterrupt()]
    assert not any(map(meeting.is_of_ranks, others))


class Stopped:
    """A store whose process is stopped: no request returns."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: time.sleep(60)


def test_a_store_that_does_not_answer_is_rank_0_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ANSWER_S", 0.1)
    monkeypatch.setattr(meeting, "GRACE_S", 0.1)
    store: Any = Stopped()
    rank = Meeting(store, store, rank=1, size=2)
    rank.hosts = ["a", "b"]
    assert "no answer from rank 0 on a:" in str(rank.explain(RuntimeError(CLOSED)))
    rank.report(ValueError("nobody reads it"))
    with pytest.raises(DistributedError, match=r"save: rank 0 on a is gone, or has not joined within 0.1 s"):
        rank.wait("save", timedelta(seconds=0.1))
