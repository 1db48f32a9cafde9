import pytest

from dovetail_runtime import Process, bootstrap, initialize, shutdown


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", *bootstrap._CLUSTERS):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_no_op_also_when_said_explicitly(monkeypatch):
    """The same script runs on a laptop; shutdown has nothing to do there either."""
    assert initialize() == Process(0, 1, None)
    assert initialize(num_processes=1) == Process(0, 1, None)
    assert initialize("localhost:1234", 1, process_id=0) == Process(0, 1, "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    assert initialize() == Process(0, 1, None)
    shutdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "h:1"}, "missing num_processes .or JAX_NUM_PROCESSES.*process_id"),
        ({"num_processes": 2}, "missing coordinator .or JAX_COORDINATOR_ADDRESS"),
        ({"process_id": 0}, "missing coordinator"),
        ({"coordinator": "h:1", "num_processes": 2}, "missing process_id"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "process_id=2 of num_processes=2"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": -1}, "process_id=-1"),
        ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "num_processes=0"),
        ({"coordinator": "h", "num_processes": 2, "process_id": 1}, "'h'; give 'host:port'"),
        ({"coordinator": "h:x", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "h:70000", "num_processes": 2, "process_id": 1}, "host:port"),
        ({"coordinator": "h:1", "num_processes": "two", "process_id": 1}, "'two'; give an integer"),
        ({"coordinator": "h:1", "num_processes": True, "process_id": 0}, "True; give an integer"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": 1.5}, "timeout=1.5"),
        ({"heartbeat_timeout": -1}, "heartbeat_timeout=-1"),
    ],
)
def test_half_the_settings_or_wrong_ones_say_what_is_missing(arguments, message):
    """A process that silently trains alone is worse than an error."""
    with pytest.raises(ValueError, match=message):
        initialize(**arguments)


def test_environment_variables_fill_in_and_are_checked_like_arguments(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match=r"'process_id': '1'.*missing coordinator"):
        initialize()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "nine")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    with pytest.raises(ValueError, match=r"JAX_NUM_PROCESSES. is 'nine'"):
        initialize()


def test_clusters_of_one_task_are_one_process():
    assert bootstrap._cluster_size({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}) == 1
    assert bootstrap._cluster_size({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"}) == 8
    assert bootstrap._cluster_size({"SLURM_NTASKS": "8"}) == 1
    assert bootstrap._cluster_size({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "4"}) == 4


def test_an_absent_coordinator_is_an_error_after_the_timeout(start):
    """jax alone aborts the interpreter with a C++ stack trace here."""
    program = """
import time
from dovetail_runtime import initialize
begin = time.monotonic()
try:
    initialize("127.0.0.1:9", 2, process_id=1, timeout=1)
except RuntimeError as error:
    print("ERROR", error, time.monotonic() - begin < 10)
"""
    [(code, output)] = start(program).finish(60)
    assert code == 0, output
    assert "ERROR nothing listens at 127.0.0.1:9 after 1 s" in output
    assert "True" in output


def test_a_backend_in_use_is_named(start):
    program = """
import jax; jax.devices()
from dovetail_runtime import initialize
try:
    initialize("127.0.0.1:9", 2, process_id=0)
except RuntimeError as error:
    print("ERROR", error)
"""
    [(code, output)] = start(program).finish(60)
    assert code == 0, output
    assert "ERROR a jax backend is already in use; call dovetail_runtime.initialize() before" in output


SLURM = """
import os
os.environ.update(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2",
                  SLURM_PROCID=os.environ.pop("JAX_PROCESS_ID"), SLURM_LOCALID="0",
                  JAX_COORDINATOR_PORT=os.environ.pop("JAX_COORDINATOR_ADDRESS").split(":")[1])
del os.environ["JAX_NUM_PROCESSES"]
"""
TWO = """
import jax, jax.numpy as jnp
from dovetail_runtime import initialize, shutdown
me = initialize(timeout=60)
assert me.count == 2 and me.index == jax.process_index()
total = jax.experimental.multihost_utils.process_allgather(jnp.array(me.index + 1)).sum()
assert initialize() == me and initialize(me.coordinator, 2, process_id=me.index) == me
try:
    initialize("127.0.0.1:9", 2, process_id=me.index)
except RuntimeError as error:
    print("REFUSED", "shutdown() first" in str(error))
shutdown(); shutdown()
print("SUM", int(total), me.index)
"""


@pytest.mark.parametrize("prefix", ["", SLURM], ids=["variables", "slurm"])
def test_two_processes_meet_twice_is_once_and_other_settings_are_refused(start, prefix):
    """Real gloo processes: the bootstrap that every multi-host run goes through."""
    results = start(prefix + "import jax.experimental.multihost_utils\n" + TWO, 2).finish(90)
    for index, (code, output) in enumerate(results):
        assert code == 0, output
        assert f"SUM 3 {index}" in output
        assert "REFUSED True" in output
