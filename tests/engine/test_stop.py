import os
import signal
import subprocess
import sys
import time

import pytest

from octvideo.engine.stop import SIGNALS, Stopped, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_request_notes_the_first_signal_and_leaves_every_second_one_to_the_system(number: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check(3)
        stop.poll()
        os.kill(os.getpid(), number)
        with pytest.raises(
            Stopped, match=f"stopped by {signal.Signals(number).name} at step 4; nothing had to be"
        ) as caught:
            stop.check(4)
        assert caught.value.status == 128 + number
        with pytest.raises(Stopped):
            stop.poll()
        assert {signal.getsignal(each) for each in SIGNALS} == {signal.SIG_DFL}
    assert signal.getsignal(number) == before


def test_a_signal_that_was_ignored_before_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            stop.check(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_is_sent_twice_at_once_is_one_request_and_a_later_one_ends_the_process() -> None:
    """timeout(1) sends its signal to the process and to its group."""
    code = (
        "import time\nfrom octvideo.engine.stop import StopRequest\nwith StopRequest() as stop:\n"
        "    print('ready', flush=True)\n    while not stop.received: time.sleep(0.001)\n"
        "    print('noted', flush=True)\n    time.sleep(30)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noted\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
