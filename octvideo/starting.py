"""The first import of each program: ctrl-C ends it with status 130 and no traceback until octvideo.command.run takes over.

Importing torch takes seconds, in which Python would print where in it the KeyboardInterrupt occurred.
"""

import signal

from octvideo.command import end_quietly

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if the program was started to ignore SIGINT
    signal.signal(signal.SIGINT, end_quietly)
