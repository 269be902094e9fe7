import os
import signal

import pytest

from octvideo.engine.stop import Stopped, StopRequest


def test_a_stop_request_notes_the_first_signal_and_leaves_the_second_to_the_system() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        stop.check(3)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Stopped, match="stopped by SIGUSR1 at step 4"):
            stop.check(4)
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == before
