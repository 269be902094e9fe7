"""The bases of all exceptions that a user sees as one message, without a traceback (octvideo.command prints them)."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be met: a wrong key, value, flag or list. Exit status 2."""

    status = 2


class RunError(Exception):
    """Work that cannot be completed: a damaged file, a full disk, a lost process. Exit status 1."""

    status = 1


class Interrupted(Exception):
    """The end of the work at the user's or the system's request. status: 128 + the number of the signal."""

    status = 130


def shown(value: object, limit: int = 80) -> str:
    """Return a value from somebody's file on one line for a message: control characters escaped, cut after `limit`."""
    if isinstance(value, str | bytes):
        text = repr(value[:limit])
        return text if len(value) <= limit else f"{text[:-1]}...{text[-1]}"
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def plain(text: str, limit: int = 200) -> str:
    """Return a text from somebody's file for a message, as `shown` does but without quotes."""
    return text if text.isprintable() and len(text) <= limit else shown(text, limit)[1:-1]
