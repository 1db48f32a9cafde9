"""What child processes of the tests run, and the states that they and the tests both know."""

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np


class Counter:
    """A loader whose position is a number; it meets the contract of dovetail_protocols.Loader."""

    def __init__(self, position=0):
        self.position = position

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return np.full(2, self.position)

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def expected(step):
    """The state of a step, as NumPy values."""
    generator = np.random.default_rng(step)
    return {
        "w": generator.normal(size=(257, 33)).astype(np.float32),
        "n": {"i": generator.integers(0, 1 << 40, 100), "step": step},
    }


def suicide(stage, at):
    """A fault that kills this process at the given stage."""
    if stage == at:
        os.kill(os.getpid(), signal.SIGKILL)


def save_until_killed(path, first, stage, progress):
    """Save steps from `first` on, reporting each committed one; die at `stage` of the third save, or never."""
    import jax.numpy as jnp

    from dovetail_checkpoint import Manager, all_steps

    saves = [0]

    def fault(at):
        if saves[0] == 3 and stage != "random":
            suicide(at, stage)

    with Manager(path, keep=all_steps(), _fault=fault) as manager:
        for step in range(first, first + 10_000):
            saves[0] += 1
            state = expected(step)
            manager.save(step, {"w": jnp.asarray(state["w"]), "n": state["n"]}, data=Counter(step))
            manager.wait()
            Path(progress).write_text(str(step))


def hold(path):
    """Save a step and stay alive without closing."""
    from dovetail_checkpoint import Manager

    manager = Manager(path)
    manager.save(1, expected(1))
    manager.wait()
    print("ready", flush=True)
    time.sleep(60)


def _join_distributed(port, index):
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    return jax


def distributed(path, port, index, mode):
    """One of two processes: save, then restore, or fail as `mode` says."""
    faulthandler.dump_traceback_later(100, exit=True)
    jax = _join_distributed(port, index)
    import jax.numpy as jnp

    from dovetail_checkpoint import Manager, latest

    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    values = expected(0)["w"][:256]
    keys = jax.random.split(jax.random.key(7), 4)

    def make(array, sharding):
        return jax.make_array_from_callback(array.shape, sharding, lambda place: array[place])

    failures = []

    def fault(stage):
        failures.append(stage)
        if mode == "bad" and failures.count("manifest") == 1 and stage == "manifest":
            raise OSError(28, "No space left on device")
        if mode == "bad":
            suicide(stage, "commit")

    state = {
        "split": make(values, split),
        "same": make(values[:3], jax.NamedSharding(mesh, jax.P())),
        "keys": jax.jit(lambda: jax.random.split(jax.random.key(7), 4), out_shardings=split)(),
        "local": jnp.arange(5),
        "host": values[:2],
        "count": 3,
        "none": None,
    }
    manager = Manager(path, keep=latest(2), _fault=fault)
    loader = Counter(11)
    if mode == "bad":
        manager.save(1, state, data=loader)
        try:
            manager.wait()
        except (OSError, RuntimeError) as error:
            print(f"raised {type(error).__name__}: {error}", flush=True)
        print("steps", manager.steps(), flush=True)
        manager.save(2, state, data=loader)
        manager.wait()
    for step in (1, 2, 3):
        manager.save(step, state, data=loader, meta={"step": step})
    manager.wait()
    assert manager.steps() == [2, 3], manager.steps()
    try:
        manager.save(3, state)
    except ValueError as error:
        print(f"refused: {error}", flush=True)
    restored = manager.restore(state, data=(other := Counter()))
    assert (restored.step, other.position, restored.meta) == (3, 11, {"step": 3})
    assert restored.state["split"].sharding == split
    for shard in restored.state["split"].addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])
    np.testing.assert_array_equal(np.asarray(restored.state["local"]), np.arange(5))
    local_keys = jax.random.key_data(restored.state["keys"]).addressable_shards
    for shard in local_keys:
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(jax.random.key_data(keys))[shard.index])
    plain = manager.restore().state
    np.testing.assert_array_equal(plain["split"], values)
    try:
        manager.restore({"missing": jnp.zeros(2)})
    except ValueError as error:
        print(f"mismatch: {str(error).splitlines()[0]}", flush=True)
    if index == "0":  # damage the newest step: both processes fall back to the one before it
        (Path(path) / "3" / "data.json").write_text("{}")
    jax.experimental.multihost_utils.sync_global_devices("damaged")
    print("fell back to", manager.restore(state).step, flush=True)
    manager.close()
    jax.distributed.shutdown()


if __name__ == "__main__":
    import jax

    jax.config.update("jax_platforms", "cpu")
    {"hold": hold, "distributed": distributed}[sys.argv[1]](*sys.argv[2:])
