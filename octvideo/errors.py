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
