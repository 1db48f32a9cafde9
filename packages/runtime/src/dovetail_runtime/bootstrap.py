"""Start and stop jax's multi-process mode from explicit settings, the environment, or the cluster that is found."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from dovetail_runtime._jaxcompat import distributed_settings

__all__ = ["Process", "barrier", "initialize", "shutdown"]

_VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# What each launcher sets for its processes; jax's own detection reads the rest.
_CLUSTERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is; `coordinator` is None when there is only one and none was named."""

    index: int
    count: int
    coordinator: str | None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    *,
    process_id: int | None = None,
    timeout: int = 300,
    heartbeat_timeout: int = 100,
    shutdown_timeout: int = 300,
) -> Process:
    """Join the processes of this run; with one process do nothing.

    Call it before anything that touches a device. Each setting comes from its argument or else from its environment
    variable (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID). If none is given and SLURM or Open MPI
    started several processes, jax's detection fills them in. On CPU, collectives use gloo. A second call with the same
    settings returns the same answer. Afterwards SIGTERM no longer ends the process by itself: see `preemption`.

    Args:
        coordinator: ``host:port`` of process 0, the same everywhere.
        num_processes: how many processes there are.
        process_id: the index of this one, from 0.
        timeout: seconds to wait for the others to appear.
        heartbeat_timeout: seconds of silence after which a process counts as dead.
        shutdown_timeout: seconds to wait for the others at the end.

    Raises:
        ValueError: some settings are missing or out of range.
        RuntimeError: already running with other settings, a backend is already in use, or nothing listens at
            `coordinator`. If others fail to appear later on, jax's coordination service ends this process after
            `timeout` with a message on stderr; Python cannot catch that.

    >>> initialize()
    Process(index=0, count=1, coordinator=None)
    """
    for name, seconds in (("timeout", timeout), ("heartbeat_timeout", heartbeat_timeout)):
        if isinstance(seconds, bool) or not isinstance(seconds, int) or seconds < 1:
            raise ValueError(f"{name}={seconds!r}; give whole seconds, at least 1")
    arguments = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    settings = _settings(arguments, os.environ)
    running = distributed_settings()
    if running is not None:
        return _again(settings, running)
    if settings is None and not _cluster_size(os.environ) > 1:
        return Process(0, 1, None)
    if settings is not None and settings[1] == 1:
        return Process(0, 1, settings[0])
    _use_gloo()
    _connect(settings, timeout, heartbeat_timeout, shutdown_timeout)
    found = distributed_settings()
    if found is None:
        raise RuntimeError("jax.distributed reports no settings after it was initialized")
    return Process(found[2], found[1], found[0])


def shutdown() -> None:
    """Leave the run: waits for the other processes; does nothing if `initialize` did nothing."""
    if distributed_settings() is not None:
        jax.distributed.shutdown()


def _settings(arguments: Mapping[str, str | int | None], environ: Mapping[str, str]) -> tuple[str, int, int] | None:
    values = {name: environ.get(_VARIABLES[name]) if given is None else given for name, given in arguments.items()}
    known = {name: value for name, value in values.items() if value is not None}
    if not known or (known.get("num_processes") in (1, "1") and len(known) < len(values)):
        return None
    missing = [f"{name} (or {_VARIABLES[name]})" for name in values if name not in known]
    if missing:
        raise ValueError(f"several processes need all three settings: {known} given, missing {', '.join(missing)}")
    count, index = _integer("num_processes", known["num_processes"]), _integer("process_id", known["process_id"])
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process_id={index} of num_processes={count}; expected 0 <= process_id < num_processes")
    return _address(known["coordinator"]), count, index


def _integer(name: str, value: str | int) -> int:
    try:
        if isinstance(value, bool):
            raise ValueError
        return int(value)
    except ValueError:
        raise ValueError(f"{name} (or {_VARIABLES[name]}) is {value!r}; give an integer") from None


def _address(value: str | int) -> str:
    host, _, port = str(value).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"coordinator (or JAX_COORDINATOR_ADDRESS) is {value!r}; give 'host:port' of process 0")
    return str(value)


def _cluster_size(environ: Mapping[str, str]) -> int:
    sizes = [environ.get(size, "") for marker, size in _CLUSTERS.items() if marker in environ]
    return max((int(size) for size in sizes if size.isdecimal()), default=1)


def _again(settings: tuple[str, int, int] | None, running: tuple[str, int, int]) -> Process:
    if settings is not None and settings != running:
        raise RuntimeError(
            f"already initialized as (coordinator, num_processes, process_id) = {running}, now asked for {settings}; "
            "call shutdown() first"
        )
    return Process(running[2], running[1], running[0])


def _use_gloo() -> None:
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")


def _connect(settings: tuple[str, int, int] | None, timeout: int, heartbeat: int, closing: int) -> None:
    coordinator, count, index = settings or (None, None, None)
    if coordinator and index:
        timeout = _await_coordinator(coordinator, timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=closing,
        )
    except RuntimeError as error:
        if "must be called before" in str(error):
            fix = "call dovetail_runtime.initialize() before any computation and before jax.devices()"
            raise RuntimeError(f"a jax backend is already in use; {fix}") from error
        who = "a process found by jax" if settings is None else f"process {index} of {count} at {coordinator}"
        raise RuntimeError(f"{who} could not join within {timeout} s: {error}") from error


def _await_coordinator(coordinator: str, timeout: int) -> int:
    """Wait until somebody listens there and return the seconds left: jax's own client aborts the process instead."""
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(1.0, timeout / 10)):
                return max(1, round(end - time.monotonic()))
        except OSError as error:
            if time.monotonic() >= end:
                fix = "check the address, that process 0 runs, and that the port is open"
                raise RuntimeError(f"nothing listens at {coordinator} after {timeout} s ({error}); {fix}") from None
        time.sleep(0.1)


def barrier(name: str) -> None:
    """Return when every process has called this with the same name; with one process do nothing.

    Raises:
        ValueError: `name` is empty.
    """
    if not name:
        raise ValueError("barrier(''); give a name that says what the processes wait for")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
