"""Files whose claimed sizes are compared with the bytes that are present, before memory is allocated for a claim."""

from __future__ import annotations

import errno
import io
import os
import struct
import zipfile
from pathlib import Path

CONTENTS = 4 << 20  # bytes of a table of contents, about 50,000 entries; in memory it takes ten times as much
BLOCK = 1 << 20  # bytes that are copied at a time


class ClaimError(ValueError):
    """A file that is damaged, or that claims more than it holds or than may be read; the text is the reason."""


class BoundedFile(io.BufferedReader):
    """A file open for reading. A read allocates for what is left in the file, not for what is requested.

    limit: bytes that a single read may return; None for no limit. Errors: OSError from opening and reading.
    """

    def __init__(self, path: Path, limit: int | None = None) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size
        self.limit = self.size if limit is None else limit

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self.tell())
        size = left if size is None or size < 0 else min(size, left)
        if size > self.limit:
            raise ClaimError(f"a part of {size} bytes where at most {self.limit} are read")
        return super().read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ClaimError("a part that begins outside the file") from error


class StoredZip:
    """A zip archive without compression, as torch.save and numpy.savez write it.

    sizes: bytes of each member. Together they are no more than the file has, so no member can expand, and two members
    cannot use the same bytes. Errors: ClaimError for other archives, OSError.
    """

    def __init__(self, path: Path) -> None:
        self._file = BoundedFile(path, CONTENTS)
        try:
            self._zip = zipfile.ZipFile(self._file)
        except _BROKEN as error:
            self._file.close()
            raise ClaimError(_reason(error)) from error
        except BaseException:
            self._file.close()
            raise
        self.size = self._file.size
        self.sizes = {entry.filename: entry.file_size for entry in self._zip.infolist()}
        if problem := self._problem():
            self.close()
            raise ClaimError(problem)

    def __enter__(self) -> StoredZip:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._zip.close()
        self._file.close()

    def read(self, name: str) -> bytes:
        """Return the bytes of a member, whose checksum agrees."""
        content = bytearray(self.sizes[name])
        self.read_into(name, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, target: memoryview) -> None:
        """Copy the bytes of a member, whose checksum agrees, to `target`, which has the member's size."""
        try:
            with self._zip.open(name) as member:
                for start in range(0, len(target), BLOCK):
                    part = target[start : start + BLOCK]
                    part[:] = member.read(len(part))
        except _BROKEN as error:
            if "CRC-32" in str(error):
                raise ClaimError(f"the checksum of {name} does not agree") from error
            raise ClaimError(f"{name}: {_reason(error)}") from error

    def _problem(self) -> str:
        entries = self._zip.infolist()
        if len(self.sizes) != len(entries):
            return "two members have the same name"
        for entry in entries:
            stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
            if not stored or entry.flag_bits & 1:
                return f"{entry.filename} is compressed or encrypted; members that are stored unchanged are read"
        claimed = sum(self.sizes.values())
        return f"members of {claimed} bytes in a file of {self.size}" if claimed > self.size else ""


# What zipfile was seen to raise for damaged archives.
_BROKEN = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error, OverflowError)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
