"""Replace this process by a command that gets SIGTERM when its parent process ends, in whatever way that ends.

python -I -S with_parent.py PARENT COMMAND [ARGUMENT ...]

PARENT: process number of the parent, which may have ended before this file asks for the signal. Linux only: elsewhere the
command starts without that link to its parent. This is a separate program, because what `subprocess` calls between fork
and exec (preexec_fn) is not safe in a process with threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; the setting survives exec


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
