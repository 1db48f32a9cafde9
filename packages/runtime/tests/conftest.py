"""Starts real processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest


class Children:
    """Python processes of one run; `finish` returns (exit code, output) of each, killed at the deadline."""

    def __init__(self, program, settings):
        base = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "OMPI_", "XLA_"))}
        base |= {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-c", program]
        self.processes = [subprocess.Popen(command, env=base | extra, **pipes) for extra in settings]
        self.outputs = [[] for _ in self.processes]
        self._readers = [
            threading.Thread(target=lambda p=p, o=o: o.extend(iter(p.stdout.readline, "")), daemon=True)
            for p, o in zip(self.processes, self.outputs, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    def wait_for(self, text, seconds=60.0):
        end = time.monotonic() + seconds
        while not all(any(text in line for line in output) for output in self.outputs):
            assert time.monotonic() < end, f"no {text!r} after {seconds} s: {self.outputs}"
            time.sleep(0.05)

    def finish(self, seconds=60.0):
        end = time.monotonic() + seconds
        codes = []
        for process, reader in zip(self.processes, self._readers, strict=True):
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            reader.join(5)
            codes.append(process.returncode)
        return [(code, "".join(output)) for code, output in zip(codes, self.outputs, strict=True)]

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def start():
    """start(program, count=1, env={}) starts `count` processes that find each other through the JAX_ variables."""
    started = []

    def run(program, count=1, env=None):
        settings = [dict(env or {}) for _ in range(count)]
        if count > 1:
            address = f"127.0.0.1:{free_port()}"
            for i, extra in enumerate(settings):
                found = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
                extra.update(found)
        started.append(Children(program, settings))
        return started[-1]

    yield run
    for children in started:
        children.kill()
