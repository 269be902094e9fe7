"""What all command lines share: errors are messages, and a lost terminal or a closed pipe does not end the work."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from octvideo import streams
from octvideo.errors import Interrupted, RunError, UserError

Main = Callable[..., int]


def run(main: Main) -> int:
    """Call main() as a program and return its exit status.

    Standard output and standard error never raise (octvideo.streams).
    """
    streams.guard()
    status = main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status


def reports_errors(main: Main) -> Main:
    """Decorate main: an expected error becomes one message on standard error, and its exit status is returned.

    Status 2: the request is wrong (UserError). 1: the work failed (RunError, OSError, MemoryError). 130: ctrl-C.
    128 + N: stopped by signal N (Interrupted).
    """

    @functools.wraps(main)
    def guarded(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments)
        except (UserError, RunError) as error:
            print(f"error: {error}", file=sys.stderr)
            return error.status
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            return stop.status
        except MemoryError as error:
            print(f"error: not enough memory ({str(error) or 'no details'})", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return guarded
