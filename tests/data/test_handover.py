import pickle
import socket
from typing import Any

import pytest
import torch

from octvideo.data import handover


def received(value: Any) -> Any:
    """What arrives at the other end of a socket."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, its:
        handover.hand_over(its, value)
        message, descriptors, _, _ = socket.recv_fds(ours, handover.MESSAGE, 1)
        return handover.taken_over(message, descriptors)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
        torch.arange(24.0).view(4, 6).t(),
        torch.arange(10)[::3],
        torch.tensor([True, False]),
        torch.tensor(5),
        torch.empty((0,) * 6, dtype=torch.uint8),
    ],
    ids=["uint8", "transposed", "strided", "bool", "scalar", "empty"],
)
def test_tensors_arrive_as_they_were_sent(tensor: torch.Tensor) -> None:
    first, (second, text) = received((tensor, [torch.ones(3), "text"]))
    assert first.dtype == tensor.dtype and torch.equal(first, tensor)
    assert torch.equal(second, torch.ones(3)) and text == "text"
    first.add_(0 if tensor.dtype != torch.bool else False)  # memory that may be written


def test_a_message_is_small_whatever_the_batch() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, its:
        handover.hand_over(its, [torch.zeros(10_000_000, dtype=torch.uint8), "x" * 1_000_000])
        message = ours.recv(handover.MESSAGE)
    assert len(message) < 100


def test_a_message_without_its_descriptor_is_an_error_of_the_limit() -> None:
    with pytest.raises(handover.WorkerError, match="ulimit -n is [0-9]"):
        handover.taken_over(pickle.dumps([100]), [])
