"""Videos of a list in a few large plain tar files, each readable in place by its offset and size.

`python datasets/kinetics.py shards` is the front of it. Which file is in which shard, and every byte, follow from the
list, the files and the size of a shard alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from octvideo.data.lists import VideoList

if TYPE_CHECKING or __package__:
    from datasets import motion
else:  # imported by a script, which has this folder on its path
    import motion

NOT_WRITTEN: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
FORMAT: Final = tarfile.PAX_FORMAT  # plain ustar, but for names and sizes that do not fit there


@dataclass(frozen=True)
class Member:
    """A video in a shard. name: its relative path; line: its place in the list; size in bytes."""

    name: str
    source: str
    line: str
    label: int
    size: int

    def info(self) -> tarfile.TarInfo:
        """Its header, the same for the same name and size: owner, time and mode of the file are left out."""
        info = tarfile.TarInfo(self.name)
        info.size, info.mode = self.size, 0o644
        return info

    def header(self) -> int:
        """Bytes of the header: the data follow."""
        return len(self.info().tobuf(FORMAT))

    def padded(self) -> int:
        """Bytes of header and data, with what fills the last block."""
        return self.header() + -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def copy(self, tar: tarfile.TarFile) -> None:
        """Adds it to an archive. OSError where the file is not what the list was made from."""
        try:
            with Path(self.source).open("rb") as data:
                tar.addfile(self.info(), data)
                if data.read(1):
                    raise OSError("grew while it was read: run again when it is finished")
        except OSError as error:
            if error.errno in NOT_WRITTEN:  # of the archive, not of the video
                raise
            raise OSError(f"{self.line}: {self.source}: {error.strerror or error}") from error


@dataclass(frozen=True)
class Shard:
    """One tar file, and a unit of work as motion.work asks of it."""

    file: str
    members: tuple[Member, ...]

    def size(self) -> int:
        """Bytes of the whole file: the members, two empty blocks, and what fills the last record."""
        content = sum(member.padded() for member in self.members) + 2 * tarfile.BLOCKSIZE
        return -(-content // tarfile.RECORDSIZE) * tarfile.RECORDSIZE

    def lines(self) -> list[str]:
        """Lines of the list: FILE:OFFSET:SIZE:NAME LABEL, with the place of the data in bytes."""
        lines, place = [], 0
        for member in self.members:
            lines.append(f"{self.file}:{place + member.header()}:{member.size}:{member.name} {member.label}\n")
            place += member.padded()
        return lines

    def write(self, out: Path, _: Any) -> int:
        """Writes the file, whole or not at all, and returns the number of members. OSError names what cannot be read."""
        unfinished = out / f".{self.file}.part"
        try:
            with tarfile.open(unfinished, "w", format=FORMAT) as tar:
                for member in self.members:
                    member.copy(tar)
            unfinished.replace(out / self.file)
        except OSError as error:
            if error.errno in NOT_WRITTEN:
                raise OSError(f"{out / self.file}: cannot be written ({error.strerror})") from error
            raise
        finally:
            with contextlib.suppress(OSError):  # on a disk that became read-only
                unfinished.unlink()
        return len(self.members)


def strays(videos: VideoList) -> list[str]:
    """Lines whose path leads out of the prefix, so that it would lead out of the folder to be written too."""
    paths = (PurePosixPath(videos.name(index)) for index in range(len(videos)))
    return [
        f"{videos.place(index)}: {str(path)!r} leads out of the prefix; give a path below it, without .."
        for index, path in enumerate(paths)
        if path.is_absolute() or ".." in path.parts
    ]


def read_members(videos: VideoList) -> list[Member]:
    """The files of a list. SettingsError names every line whose file is missing, or is none."""
    problems = strays(videos)
    members: list[Member] = []
    for index in range(0 if problems else len(videos)):
        name, source, line = str(PurePosixPath(videos.name(index))), videos.path(index), videos.place(index)
        try:
            found = Path(source).stat()
        except OSError as error:
            problems.append(f"{line}: {source}: {error.strerror}; check the path and the prefix {videos.prefix!r}")
            continue
        if not S_ISREG(found.st_mode):
            problems.append(f"{line}: {source} is no file")
        members.append(Member(name, source, line, videos.label(index), found.st_size))
    refuse(problems)
    return members


def refuse(problems: Sequence[str], shown: int = 20) -> None:
    """Raises SettingsError with the problems, if there are any."""
    if problems:
        more = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
        raise motion.SettingsError("\n".join([f"{len(problems)} problem(s)", *problems[:shown], *more]))


def split(members: Sequence[Member], name: str, most: int) -> list[Shard]:
    """The shards of up to `most` bytes each; a video that is larger has one of its own."""
    groups: list[list[Member]] = []
    filled = most
    for member in members:
        if not groups or filled + member.padded() > most:
            groups.append([])
            filled = 2 * tarfile.BLOCKSIZE
        groups[-1].append(member)
        filled += member.padded()
    return [Shard(f"{name}-{number:05d}.tar", tuple(group)) for number, group in enumerate(groups)]


def fingerprint(members: Sequence[Member]) -> str:
    """What tells one list of videos from another: their names, labels and sizes, hashed."""
    lines = "".join(f"{member.name}\t{member.label}\t{member.size}\n" for member in members)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def check_name(name: str) -> None:
    """SettingsError where a name cannot begin file names."""
    if not re.fullmatch(r"[\w-][\w.-]*", name, re.ASCII):
        raise motion.SettingsError(f"name is {name!r}: give letters, digits, - and _ such as train")


def write(shards: Sequence[Shard], name: str, out: Path, workers: int) -> int:
    """Writes the shards that are missing in folder `out`, then the list NAME.txt, and returns their number.

    SettingsError where a shard is there that is not of the size it should be; OSError where a file cannot be read.
    """
    missing = [shard for shard in shards if not (out / shard.file).exists()]
    whole = [shard for shard in shards if (out / shard.file).exists()]
    refuse(
        [
            f"{out / shard.file} has {found} bytes, not {shard.size()}: it was changed; remove it, then run again"
            for shard in whole
            if (found := (out / shard.file).stat().st_size) != shard.size()
        ]
    )
    total = sum(len(shard.members) for shard in shards)
    with tqdm(total=total, initial=sum(len(shard.members) for shard in whole), unit="file", desc=name) as progress:
        for count in motion.work(missing, out, None, workers):  # type: ignore[arg-type]  # it only calls their `write`
            progress.update(count)
    motion.write_text(out / f"{name}.txt", "".join(line for shard in shards for line in shard.lines()))
    return len(missing)
