"""The checkpointer kit accepts a small good one and rejects each named broken one."""

import copy
import json
import pickle
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 - registers bfloat16 for NumPy
import numpy as np
import pytest

from dovetail_protocols import Checkpointer, Restored, paths
from dovetail_protocols.testing import ConformanceError, check_checkpointer


def is_key(leaf):
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Good:
    """Writes each step with a thread into a temporary directory and renames it."""

    delay = 0.0

    def __init__(self, where):
        self.where, self.thread, self.failure = where, None, None
        where.mkdir(parents=True, exist_ok=True)

    def capture(self, state):
        return jax.tree.map(self.host, state)

    def host(self, leaf):
        if is_key(leaf):
            return ("key", str(jax.random.key_impl(leaf)), np.array(jax.random.key_data(leaf)))
        kind = "jax" if isinstance(leaf, jax.Array) else "array" if isinstance(leaf, np.ndarray) else "number"
        return (kind, None, np.array(leaf, copy=True) if kind != "number" else leaf)

    def save(self, step, state, *, data=None, meta=None, metrics=None):
        self.wait()
        if step in self.steps():
            raise ValueError(f"step {step} exists")
        content = {"state": self.capture(state), "data": copy.deepcopy(data.get_state()) if data else None}
        text = json.dumps(meta or {})
        self.thread = threading.Thread(target=self.write, args=(step, content, text))
        self.thread.start()

    def write(self, step, content, text):
        temporary = self.where / f"tmp-{step}"
        temporary.mkdir()
        (temporary / "meta.json").write_text(text)
        time.sleep(self.delay)
        (temporary / "state.pickle").write_bytes(pickle.dumps(content))
        temporary.rename(self.where / f"step-{step}")

    def steps(self):
        return sorted(int(path.name[5:]) for path in self.where.glob("step-*"))

    def restore(self, like=None, *, data=None, step=None):
        known = self.steps()
        if not known or (step is not None and step not in known):
            raise FileNotFoundError(f"no step {step} in {self.where}; there are {known}")
        step = known[-1] if step is None else step
        folder = self.where / f"step-{step}"
        content = pickle.loads((folder / "state.pickle").read_bytes())
        if data is not None:
            data.set_state(content["data"])
        is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
        if like is None:
            state = jax.tree.map(lambda x: x[2], content["state"], is_leaf=is_leaf)
        else:
            state = self.fit(jax.tree.map(lambda x: [x], content["state"], is_leaf=is_leaf), like)
        return Restored(step, state, json.loads((folder / "meta.json").read_text()))

    def fit(self, saved, like):
        names, flat = paths.flatten(like), self.flat(saved)
        for name in sorted(set(names) ^ set(flat)):
            raise ValueError(f"{name}: {'saved' if name in flat else 'absent'}, not as in like")
        return jax.tree_util.tree_map_with_path(lambda p, leaf: self.leaf(paths.path_of(p), flat, leaf), like)

    def flat(self, saved):
        found = jax.tree_util.tree_leaves_with_path(saved, is_leaf=lambda x: isinstance(x, tuple))
        return {paths.path_of(path[:-1]): leaf for path, leaf in found}

    def leaf(self, name, flat, like):
        kind, impl, value = flat[name]
        if kind == "key":
            return self.key(impl, value, like)
        if kind == "number":
            return value
        if np.shape(value) != like.shape or value.dtype != like.dtype:
            raise ValueError(f"{name}: saved {value.dtype}{value.shape}, asked for {like.dtype}{like.shape}")
        wants_jax = isinstance(like, jax.Array | jax.ShapeDtypeStruct)
        return self.put(value, like) if wants_jax else value

    def put(self, value, like):
        return jax.device_put(value, like.sharding)

    def key(self, impl, value, like):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=impl)

    def wait(self):
        if self.thread:
            self.thread.join()

    def close(self):
        self.wait()


class ListsUncommittedSteps(Good):
    delay = 0.05

    def save(self, step, *args, **kwargs):
        super().save(step, *args, **kwargs)
        self.pending = step

    def steps(self):
        return sorted({*super().steps(), *([self.pending] if hasattr(self, "pending") else [])})


class WritesInPlace(Good):
    def write(self, step, content, text):
        folder = self.where / f"step-{step}"
        folder.mkdir()
        (folder / "meta.json").write_text(text)
        time.sleep(0.05)
        (folder / "state.pickle").write_bytes(pickle.dumps(content))


class CapturesValuesLate(Good):
    delay = 0.02

    def host(self, leaf):
        if isinstance(leaf, np.ndarray):
            return ("array", None, leaf)
        return super().host(leaf)

    def write(self, step, content, text):
        time.sleep(0.02)
        super().write(step, content, text)


class CapturesMetaLate(Good):
    def save(self, step, state, *, data=None, meta=None, metrics=None):
        super().save(step, state, data=data, meta=meta)
        self.wait()
        self.late = (self.where / f"step-{step}" / "meta.json", meta or {})

    def wait(self):
        super().wait()
        if hasattr(self, "late"):
            self.late[0].write_text(json.dumps(self.late[1]))


class IgnoresDataPosition(Good):
    def restore(self, like=None, *, data=None, step=None):
        return super().restore(like, step=step)


class DataPositionIsLive(Good):
    def save(self, step, state, *, data=None, meta=None, metrics=None):
        super().save(step, state, meta=meta)
        self.wait()
        self.live = (step, data)

    def wait(self):
        super().wait()
        if hasattr(self, "live") and self.live[1] is not None:
            path = self.where / f"step-{self.live[0]}" / "state.pickle"
            content = pickle.loads(path.read_bytes())
            path.write_bytes(pickle.dumps({**content, "data": self.live[1].get_state()}))


class ReturnsWrongDtype(Good):
    def put(self, value, like):
        return super().put(value.astype(np.float32) if value.dtype == jnp.bfloat16 else value, like)


class CastsToLike(Good):
    def leaf(self, name, flat, like):
        kind, impl, value = flat[name]
        if isinstance(value, np.ndarray) and kind == "array":
            flat = {**flat, name: (kind, impl, value.astype(like.dtype))}
        return super().leaf(name, flat, like)


class LosesTypedKeys(Good):
    def key(self, impl, value, like):
        return jnp.asarray(value)


class LosesTheKeyImplementation(Good):
    def host(self, leaf):
        kind, impl, value = super().host(leaf)
        if impl not in (None, "fry", "threefry2x32"):
            impl, value = "threefry2x32", value[..., :2]
        return kind, impl, value


class OverwritesAStep(Good):
    def save(self, step, *args, **kwargs):
        self.wait()
        shutil.rmtree(self.where / f"step-{step}", ignore_errors=True)
        super().save(step, *args, **kwargs)


class RestoresTheFirstStep(Good):
    def restore(self, like=None, *, data=None, step=None):
        known = self.steps()
        return super().restore(like, data=data, step=known[0] if known and step is None else step)


class StepsAsText(Good):
    def steps(self):
        return sorted(super().steps(), key=str)


class IgnoresTheSharding(Good):
    def put(self, value, like):
        return jnp.asarray(value)


class ReturnsNumPyArrays(Good):
    def put(self, value, like):
        return value


class DropsExtraLeaves(Good):
    def fit(self, saved, like):
        flat = self.flat(saved)
        return super().fit({name: [flat[name]] for name in paths.flatten(like) if name in flat}, like)

    def flat(self, saved):
        found = jax.tree_util.tree_leaves_with_path(saved, is_leaf=lambda x: isinstance(x, tuple))
        return {"/".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in p[:-1]): leaf for p, leaf in found}


class DropsMeta(Good):
    def restore(self, *args, **kwargs):
        return super().restore(*args, **kwargs)._replace(meta={})


class ForgetsOnClose(Good):
    def close(self):
        super().close()
        shutil.rmtree(self.where, ignore_errors=True)


class MissingIsAKeyError(Good):
    def restore(self, *args, **kwargs):
        try:
            return super().restore(*args, **kwargs)
        except FileNotFoundError as error:
            raise KeyError(str(error)) from error


MUTANTS = [
    ListsUncommittedSteps,
    WritesInPlace,
    CapturesValuesLate,
    CapturesMetaLate,
    IgnoresDataPosition,
    DataPositionIsLive,
    ReturnsWrongDtype,
    CastsToLike,
    LosesTypedKeys,
    LosesTheKeyImplementation,
    OverwritesAStep,
    RestoresTheFirstStep,
    StepsAsText,
    IgnoresTheSharding,
    ReturnsNumPyArrays,
    DropsExtraLeaves,
    DropsMeta,
    ForgetsOnClose,
    MissingIsAKeyError,
]


@pytest.mark.parametrize("delay", [0.0, 0.02])
def test_a_good_checkpointer_passes(tmp_path, delay):
    class Slow(Good):
        pass

    Slow.delay = delay
    assert isinstance(Slow(tmp_path / "x"), Checkpointer)
    check_checkpointer(Slow, tmp_path)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda kind: kind.__name__)
def test_broken_checkpointers_are_rejected(mutant, tmp_path):
    with pytest.raises(ConformanceError, match="Checkpointer: ") as caught:
        check_checkpointer(mutant, tmp_path)
    assert "OSError" not in str(caught.value)
