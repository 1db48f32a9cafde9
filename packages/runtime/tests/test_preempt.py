import os
import re
import signal
import threading

import pytest

from dovetail_runtime import preemption


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, old)


def test_sigterm_sets_the_flag_and_the_old_handler_comes_back():
    """A handler that stays would make the process unkillable after the loop."""
    old = signal.getsignal(signal.SIGTERM)
    with preemption() as flag:
        assert not flag.requested
        assert not flag(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.requested
        assert flag(1)
        assert flag(2)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is old


def test_old_handlers_also_come_back_after_an_error():
    old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), preemption(sigint=True):
        raise KeyError
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == old


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    with preemption(sigint=True) as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_left_alone_by_default():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with preemption(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_request_can_be_made_by_the_program():
    with preemption() as flag:
        flag.request()
        assert flag(3)


def test_only_the_main_thread():
    errors = []

    def work():
        try:
            with preemption():
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert "main thread" in errors[0]


@pytest.mark.parametrize("step", [-1, 1.0, "1", True, None])
def test_steps_are_ints(step):
    with preemption() as flag, pytest.raises(ValueError, match="int >= 0"):
        flag(step)


LOOP = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
import dovetail_runtime as rt
me = rt.initialize(timeout=60)
made = rt.mesh(data=-1)
total = jax.jit(lambda x: x.sum())
with rt.preemption(sigint=True) as flag:
    for step in range(1000):
        x = rt.put_batch({"x": np.ones(1, np.float32)}, made, rt.DATA)["x"]
        assert float(total(x)) == 2
        if step == 5:
            print("RUNNING", flush=True)
        if flag(step):
            print("STOPPED", step, flag.requested, flag(step + 1), flush=True)
            break
        time.sleep(0.02)
rt.shutdown()
print("DONE", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "env"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGINT, {}),
        (signal.SIGTERM, {"JAX_ENABLE_PREEMPTION_SERVICE": "0"}),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM without jax's service"],
)
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(start, number, env):
    """Processes that stop at different steps hang in the next collective or save a torn checkpoint."""
    children = start(LOOP, 2, env)
    children.wait_for("RUNNING")
    children.processes[1].send_signal(number)
    results = children.finish(60)
    steps = []
    for code, output in results:
        assert code == 0, output
        steps += re.findall(r"STOPPED (\d+) True True", output)
        assert "DONE" in output
    assert len(steps) == 2
    assert steps[0] == steps[1]
