"""datasets/packets.py: where a file has zeros."""

from __future__ import annotations

from pathlib import Path

from datasets import packets


def test_zero_runs(tmp_path: Path) -> None:
    block = packets.ZERO_BLOCK
    path = tmp_path / "a"
    path.write_bytes(b"x" * block + bytes(300 * block) + b"x" * (2 * block - 1) + bytes(block) + b"x")
    assert packets.zero_runs(str(path)) == [(block, 301 * block)]  # the second run fills no complete block
    path.write_bytes(b"")
    assert packets.zero_runs(str(path)) == []
