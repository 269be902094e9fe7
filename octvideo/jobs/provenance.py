"""Where results are from: versions, device, host, commit, command line, and digests of files and lists."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import octvideo
from octvideo.data.lists import VideoList
from octvideo.files import HOST

TREE = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint records and a resumed run compares."""
    return {"octvideo": octvideo.__version__, "torch": str(torch.__version__)}


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return plain values on what runs this process: host, device, versions, commit and command line."""
    return {
        "host": HOST,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "python": platform.python_version(),
        **versions(),
        "git": commit(),
        "command": sys.argv,
    }


def commit() -> str:
    """Return the commit of this code, with "+changes" if tracked files differ from it; "" outside a git checkout."""
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(TREE), *words], capture_output=True, text=True, check=True, timeout=10
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return found[0].strip() + ("+changes" if found[1].strip() else "")


def list_digest(videos: VideoList) -> str:
    """Return the SHA-256 of the names and labels of a list, in its order; the prefix and the file's name do not count."""
    digest = hashlib.sha256(videos.names)
    digest.update(videos.ends.tobytes())
    digest.update(videos.labels.tobytes())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
