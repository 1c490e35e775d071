import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest

from experiments.training.stop import SIGNALS, StopRequest, Wish, listening


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def _stops_after(deadline, stretch, save=0.0):
    """Seconds after which a loop with equal steps is told to stop."""
    clock = Clock()
    stop = StopRequest(deadline, clock)
    stop.saved(save)
    for _ in range(100_000):
        clock.now += stretch
        if stop.wish() == Wish.STOP:
            assert stop.why == "deadline"
            return clock.now - 1000.0
    return None


@pytest.mark.parametrize("stretch", [0.01, 1.0, 7.0])
@pytest.mark.parametrize("save", [0.0, 5.0])
def test_the_deadline_leaves_time_for_a_step_and_a_checkpoint_but_not_much_more(stretch, save):
    deadline, margin = 200.0, 1.5 * (stretch + save) + 1.0
    stopped = _stops_after(deadline, stretch, save)
    assert stopped + stretch + save <= deadline
    assert stopped - stretch + margin <= deadline + 1e-6  # one step earlier was too early


def test_without_a_deadline_time_does_not_stop():
    assert _stops_after(None, 1e3) is None


def test_the_longest_stretch_counts_but_writing_a_checkpoint_is_no_stretch():
    clock = Clock()
    stop = StopRequest(100.0, clock)
    assert stop.wish() == Wish.GO_ON  # the first question starts the first stretch
    clock.now += 20
    assert stop.wish() == Wish.GO_ON
    clock.now += 30
    stop.saved(1.0)  # the 30 s until here belong to the checkpoint
    clock.now += 16.5  # 66.5 + 1.5 * (20 + 1) + 1 = 99
    assert stop.wish() == Wish.GO_ON
    clock.now += 1.5
    assert (stop.wish(), stop.why) == (Wish.STOP, "deadline")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noticed_at_the_next_question(number):
    before = signal.getsignal(number)
    stop = StopRequest(None, Clock())
    with listening(stop):
        assert stop.wish() == Wish.GO_ON
        os.kill(os.getpid(), number)
        assert (stop.wish(), stop.why) == (Wish.STOP, f"signal {signal.Signals(number).name}")
    assert signal.getsignal(number) is before


def test_a_signal_is_named_before_the_deadline():
    clock = Clock()
    stop = StopRequest(1.0, clock)
    clock.now += 10
    stop.notice(signal.SIGTERM)
    assert (stop.wish(), stop.why) == (Wish.STOP, "signal SIGTERM")


@pytest.mark.parametrize("first", SIGNALS)
def test_a_ctrl_c_after_any_signal_interrupts_at_once(first):
    stop = StopRequest(None, Clock())
    with listening(stop):
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_does_not_interrupt():
    stop = StopRequest(None, Clock())
    stop.notice(signal.SIGTERM)
    stop.notice(signal.SIGTERM)
    assert (stop.wish(), stop.why) == (Wish.STOP, "signal SIGTERM")


def test_handlers_come_back_after_an_error():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with pytest.raises(RuntimeError), listening(StopRequest(None, Clock())):
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_slow_start_is_no_stretch():
    """Twelve minutes of reading data leave most of half an hour for training."""
    clock = Clock()
    stop = StopRequest(1800.0, clock)
    clock.now += 720
    assert stop.wish() == Wish.GO_ON
    while stop.wish() == Wish.GO_ON:
        clock.now += 10
    assert 1760 < clock.now - Clock().now < 1800


def test_a_sigterm_that_means_save_asks_once_each_time():
    stop = StopRequest(None, Clock(), on_term="save")
    for _ in range(2):
        stop.notice(signal.SIGTERM)
        assert stop.wish() == Wish.SAVE
        assert stop.wish() == Wish.GO_ON
    stop.notice(signal.SIGTERM)
    stop.notice(signal.SIGUSR2)
    assert stop.wish() == Wish.STOP


def test_a_run_that_is_lost_is_left_whatever_else_was_asked():
    stop = StopRequest(None, Clock())
    stop.notice(signal.SIGUSR2)
    stop.abandon("taken")
    assert (stop.wish(), stop.why) == (Wish.ABANDON, "taken")


def test_a_terminal_that_goes_away_stops_as_sigterm_does():
    stop = StopRequest(None, Clock())
    with listening(stop):
        stop.notice(signal.SIGHUP)
        assert (stop.wish(), stop.why) == (Wish.STOP, "signal SIGHUP")
    stop = StopRequest(None, Clock(), on_term="save")
    stop.notice(signal.SIGHUP)
    assert stop.wish() == Wish.SAVE


def test_under_nohup_the_terminal_may_go():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(stop := StopRequest(None, Clock())):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.wish() == Wish.GO_ON
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_on_a_terminal_that_is_closed_saves_and_leaves(tmp_path):
    """A real terminal: writing to it is an error from then on."""
    here, there = pty.openpty()
    call = [sys.executable, "experiments/quickstart.py", "model=resnet_small", "runtime.threads=1", "epochs=400"]
    run = subprocess.Popen(
        [*call, f"runtime.runs={tmp_path}", "runtime.log_every=1"],
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(there)
    printed = b""
    while b"epoch 1/" not in printed:  # else the end of the terminal is an error here
        printed += os.read(here, 4096)
    os.close(here)
    assert run.wait(60) == 75
    assert len(list(tmp_path.glob("*/*/checkpoints/*.pt"))) == 1
