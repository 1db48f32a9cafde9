"""Kit of `Checkpointer`: whole steps only, values of the moment of the call, nothing lost or changed on the way."""

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols import paths
from dovetail_protocols.checkpointer import Checkpointer
from dovetail_protocols.testing._rules import difference, is_key, require, require_raises

__all__ = ["check_checkpointer"]

MakeManager = Callable[[Path], Checkpointer]


def check_checkpointer(make_manager: MakeManager, tmp_path: Path) -> None:
    """Check a checkpointer.

    Args:
        make_manager: ``make_manager(directory)`` returns a checkpointer that keeps every step; the directory may not
            exist yet, or hold the steps of an earlier one.
        tmp_path: an empty directory for the kit.

    Raises:
        ConformanceError: a rule is broken.
    """
    _check_round_trip(make_manager, tmp_path / "round-trip")
    _check_captured(make_manager, tmp_path / "captured")
    _check_visible(make_manager, tmp_path / "visible")
    _check_steps(make_manager, tmp_path / "steps")
    _check_data(make_manager, tmp_path / "data")
    _check_shardings(make_manager, tmp_path / "shardings")
    _check_mismatch(make_manager, tmp_path / "mismatch")


def _state() -> dict[str, Any]:
    kernel = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)
    return {
        "params": {"kernel": kernel, "half": kernel.astype(jnp.bfloat16), "list": [jnp.int8([-3, 4]), jnp.float32(2)]},
        "counts": {"uint": jnp.uint32([1, 2**32 - 1]), "flag": jnp.array([True, False]), "step": jnp.int32(7)},
        "host": np.arange(5, dtype=np.int64),
        "number": 3,
        "rate": 0.1,
        "nothing": None,
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
    }


def _without_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not is_key(value)}


def _check_round_trip(make_manager: MakeManager, where: Path) -> None:
    manager = make_manager(where)
    require(manager.steps() == [], "Checkpointer: a new directory holds no steps", steps=manager.steps())
    missing = "Checkpointer: restore without a step is a FileNotFoundError"
    require_raises(FileNotFoundError, missing, manager.restore)
    state, meta = _state(), {"note": "é", "nested": [1, None, {"x": 0.5}]}
    manager.save(3, state, meta=meta, metrics={"loss": 1.5, "valid/accuracy": math.nan})
    manager.wait()
    for kind, one in (("the same", manager), ("another", make_manager(where))):
        require(one.steps() == [3], f"Checkpointer: {kind} checkpointer lists the saved step", steps=one.steps())
        restored = one.restore(state)
        rule = f"Checkpointer: {kind} checkpointer restores every bit, dtype, key and None"
        require(difference(restored.state, state) is None, rule, diff=difference(restored.state, state))
        structures = jax.tree.structure(restored.state), jax.tree.structure(state)
        require(structures[0] == structures[1], rule, structure=structures[0], expected=structures[1])
        _check_kinds(restored.state, state)
        require(restored.step == 3, "Checkpointer: restore tells the step", step=restored.step)
        require(restored.meta == meta, "Checkpointer: meta comes back as it was given", meta=restored.meta)
        one.close()
    _check_plain(make_manager(where), state)


def _check_kinds(got: Any, expected: Any) -> None:
    right = paths.flatten(expected)
    for address, leaf in paths.flatten(got).items():
        same = isinstance(leaf, jax.Array) == isinstance(right[address], jax.Array)
        rule = "Checkpointer: a jax array comes back as one, a host value as a host value"
        require(same, rule, leaf=address, kind=type(leaf).__name__, saved=type(right[address]).__name__)


def _check_plain(manager: Checkpointer, state: dict[str, Any]) -> None:
    flat = paths.flatten(manager.restore().state)
    for address, leaf in paths.flatten(_without_keys(state)).items():
        rule = "Checkpointer: restore(None) gives the leaves as NumPy arrays"
        require(address in flat, rule, leaf=address, found=sorted(flat))
        if isinstance(leaf, jax.Array):
            require(not isinstance(flat[address], jax.Array), rule, leaf=address, kind=type(flat[address]).__name__)
        diff = difference(np.asarray(flat[address]), np.asarray(leaf))
        require(diff is None, rule, leaf=address, diff=diff)
    manager.close()


def _check_captured(make_manager: MakeManager, where: Path) -> None:
    manager = make_manager(where)
    host, device, meta = np.arange(200_000.0), jnp.arange(200_000.0), {"list": [1]}
    expected = {"host": host.copy(), "device": np.asarray(device).copy()}
    manager.save(1, {"host": host, "device": device}, meta=meta)
    host[...] = -1
    device.delete()
    meta["list"].append(2)
    manager.wait()
    restored = manager.restore()
    rule = "Checkpointer: the values are those at the time of save, whatever happens to the arrays after"
    require(difference(restored.state, expected) is None, rule, diff=difference(restored.state, expected))
    require(restored.meta == {"list": [1]}, "Checkpointer: meta is that at the time of save", meta=restored.meta)
    manager.close()


def _check_visible(make_manager: MakeManager, where: Path) -> None:
    manager = make_manager(where)
    state = {"large": np.arange(1_000_000, dtype=np.float32)}
    rule = "Checkpointer: a step that is listed is whole"
    for step in range(3):
        manager.save(step, state)
        reader = make_manager(where)
        for name, one in (("the writer", manager), ("a reader", reader)):
            for listed in one.steps():
                try:
                    diff = difference(reader.restore(step=listed).state, state)
                except Exception as error:  # noqa: BLE001 - whatever it is, the listed step is not whole
                    diff = f"{type(error).__name__}: {error}"
                require(diff is None, rule, listed_by=name, step=listed, diff=diff)
        reader.close()
    manager.wait()
    require(manager.steps() == [0, 1, 2], "Checkpointer: after wait every save is listed", steps=manager.steps())
    manager.close()


def _check_steps(make_manager: MakeManager, where: Path) -> None:
    manager = make_manager(where)
    for step in (2, 9, 10):
        manager.save(step, {"x": np.full(1, step, np.float32)})
    manager.wait()
    rule = "Checkpointer: saving a step that exists is a ValueError and changes nothing"
    require_raises(ValueError, rule, lambda: manager.save(9, {"x": np.full(1, -1, np.float32)}))
    manager.close()
    manager = make_manager(where)
    require(manager.steps() == [2, 9, 10], "Checkpointer: steps are ascending and survive", steps=manager.steps())
    require(manager.restore().step == 10, "Checkpointer: the default is the latest step", step=manager.restore().step)
    for step in (2, 9):
        restored = manager.restore(step=step)
        good = restored.step == step and float(restored.state["x"][0]) == step
        require(good, rule if step == 9 else "Checkpointer: restore(step=...) gives that step", restored=restored)
    absent = "Checkpointer: a step that was never saved is a FileNotFoundError"
    require_raises(FileNotFoundError, absent, lambda: manager.restore(step=5))
    manager.close()


class _Position:
    """A loader that is nothing but its position."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"step": 0, "files": [{"name": "a", "offset": 0}]}

    def __iter__(self) -> "_Position":
        return self

    def __next__(self) -> np.ndarray:
        self.state["step"] += 1
        self.state["files"][0]["offset"] += 10
        return np.full((2,), self.state["step"])

    def get_state(self) -> dict[str, Any]:
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)


def _check_data(make_manager: MakeManager, where: Path) -> None:
    manager, loader = make_manager(where), _Position()
    for _ in range(3):
        next(loader)
    expected = copy.deepcopy(loader.state)
    manager.save(3, {"x": np.zeros(2, np.float32)}, data=loader)
    next(loader)
    manager.wait()
    for reader in (manager, make_manager(where)):
        fresh = _Position()
        reader.restore(data=fresh)
        rule = "Checkpointer: restore sets `data` to the position that it had at the time of save"
        require(fresh.state == expected, rule, position=fresh.state, expected=expected)
        reader.close()


def _check_shardings(make_manager: MakeManager, where: Path) -> None:
    manager, value = make_manager(where), np.arange(16, dtype=np.float32).reshape(8, 2)
    manager.save(0, {"w": jnp.asarray(value), "key": jax.random.key(1)})
    manager.wait()
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices[-2:]), ("x",))
    shardings = (
        jax.sharding.SingleDeviceSharding(devices[-1]),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")),
    )
    for sharding in shardings:
        alone = jax.sharding.SingleDeviceSharding(devices[-1])
        like = {
            "w": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding),
            "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=alone),
        }
        state = manager.restore(like).state
        rule = "Checkpointer: a leaf is restored into the sharding of its ShapeDtypeStruct"
        require(isinstance(state["w"], jax.Array), rule, kind=type(state["w"]).__name__)
        good = state["w"].sharding.is_equivalent_to(sharding, 2) and difference(state["w"], value) is None
        require(good, rule, sharding=state["w"].sharding, expected=sharding)
        require(is_key(state["key"]), "Checkpointer: a typed key is restored as a typed key", key=state["key"])
    manager.close()


def _check_mismatch(make_manager: MakeManager, where: Path) -> None:
    manager = make_manager(where)
    good = {"layer": {"kernel": np.zeros((4, 3), np.float32)}, "bias": np.zeros(3, np.float32)}
    manager.save(0, good)
    manager.wait()
    cases: dict[str, tuple[Any, tuple[str, ...]]] = {
        "another shape": ({**good, "layer": {"kernel": np.zeros((4, 5), np.float32)}}, ("kernel", "3", "5")),
        "another dtype": ({**good, "bias": np.zeros(3, np.int32)}, ("bias", "float32", "int32")),
        "a leaf too many": ({**good, "extra": np.zeros(2, np.float32)}, ("extra",)),
        "a leaf too few": ({"layer": good["layer"]}, ("bias",)),
    }
    for name, (like, says) in cases.items():
        rule = f"Checkpointer: a tree with {name} is a ValueError that names the leaf and both values"
        require_raises(ValueError, rule, lambda like=like: manager.restore(like), says=says)
    manager.close()
