"""Damaged steps: found, named, moved aside and worked around; never restored as if they were right."""

import json
import os
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_workers import Counter, expected

from dovetail_checkpoint import CorruptCheckpointError, Manager, Manifest, all_steps, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two steps, 5 and 6."""
    path = tmp_path_factory.mktemp("original")
    with Manager(path, keep=all_steps()) as manager:
        for step in (5, 6):
            state = expected(step)
            manager.save(step, {"w": jnp.asarray(state["w"]), "n": state["n"]}, data=Counter(step), meta={"s": step})
    return path


def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "root")


def flip(file, r):
    data = bytearray(file.read_bytes())
    if data:
        data[r.randrange(len(data))] ^= 1 << r.randrange(8)
    file.write_bytes(data)


def truncate(file, r):
    os.truncate(file, r.randrange(max(file.stat().st_size, 1)))


def delete(file, r):
    file.unlink()


def duplicate(file, r):
    shutil.copy(file, file.with_name(f"{file.name}-{r.randrange(9)}"))


def extend(file, r):
    with open(file, "ab") as f:
        f.write(bytes([r.randrange(256)]))


def swap(file, r):
    others = sorted(p for p in file.parent.iterdir() if p.is_file() and p != file)
    if others:
        shutil.copy(r.choice(others), file)


def zeros(file, r):
    file.write_bytes(bytes(file.stat().st_size))


def other_step(file, r):
    root = next(p for p in file.parents if p.name == "6").parent
    relative = file.relative_to(root / "6")
    if (root / "5" / relative).exists():
        shutil.copy(root / "5" / relative, file)


def check(state, step):
    np.testing.assert_array_equal(state["w"], expected(step)["w"])
    np.testing.assert_array_equal(state["n"]["i"], expected(step)["n"]["i"])
    assert state["n"]["step"] == step


def test_fuzz_never_restores_wrong_values(original, tmp_path, soak, caplog):
    """Any damage to any file: the previous step comes back, or exactly the right values; quarantine tells which."""
    found, n = 0, 200 if soak else 30
    for seed in range(n):
        r = random.Random(seed)
        root = copy(original, tmp_path)
        file = r.choice(sorted(p for p in (root / "6").rglob("*") if p.is_file()))
        damage = r.choice([flip, flip, truncate, delete, duplicate, extend, swap, zeros, other_step])
        before = file.read_bytes()
        damage(file, r)
        changed = not file.exists() or file.read_bytes() != before or damage is duplicate
        loader = Counter()
        step, state, meta = Manager(root).restore(data=loader)
        check(state, step)
        assert (meta, loader.position) == ({"s": step}, step)
        assert (root / "6.corrupt-1").exists() == (step == 5)
        assert (root / "6").exists() == (step == 6)
        if file.name != "manifest.json":
            assert (step == 5) == changed, (damage.__name__, file)
        found += step == 5
        shutil.rmtree(root)
    assert found > n // 2


def test_a_flipped_bit_in_every_file_is_named(original, tmp_path):
    """The message must lead to the file, whichever it is."""
    root = copy(original, tmp_path)
    r = random.Random(0)
    files = sorted(p for p in (root / "6").rglob("*") if p.is_file() and p.stat().st_size)
    for file in files:
        before = file.read_bytes()
        flip(file, r)
        with pytest.raises(CorruptCheckpointError, match=file.name):
            verify(root / "6", "full")
        with pytest.raises(CorruptCheckpointError, match=file.name):
            Manager(root).restore(step=6)
        with pytest.raises(CorruptCheckpointError, match=file.name):
            Manager(root, on_corrupt="error").restore()
        file.write_bytes(before)
    assert Manager(root).steps() == [5, 6]
    assert verify(root / "6").step == 6


def test_levels(original, tmp_path):
    """`sizes` finds missing bytes but no flipped bit, as documented; `off` reads the manifest alone."""
    root = copy(original, tmp_path)
    data = max((root / "6").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    flip(data, random.Random(0))
    assert verify(root / "6", "sizes").step == 6
    with pytest.raises(CorruptCheckpointError, match="digest"):
        verify(root / "6")
    truncate(data, random.Random(0))
    assert verify(root / "6", "off").step == 6
    with pytest.raises(CorruptCheckpointError, match="bytes; expected"):
        verify(root / "6", "sizes")
    (root / "6" / "extra").write_text("")
    with pytest.raises(CorruptCheckpointError, match="extra is not in the manifest"):
        verify(root / "6", "sizes")


@pytest.mark.parametrize("level", ["sizes", "off"])
def test_weak_levels_fall_back_when_orbax_cannot_read(original, tmp_path, level):
    """Damage that a weak verification let pass is recognised when reading fails, and handled as such."""
    root = copy(original, tmp_path)
    zeros(root / "6" / "state" / "_METADATA", None)
    step, state, _ = Manager(root, verify=level).restore()
    check(state, step)
    assert step == 5
    assert (root / "6.corrupt-1").exists()
    zeros(root / "5" / "data.json", None)
    with pytest.raises(CorruptCheckpointError, match=r"data\.json"):
        Manager(root, verify=level).restore(data=Counter(), step=5)


@pytest.mark.parametrize("level", ["full", "sizes", "off"])
def test_a_directory_that_cannot_be_written_still_falls_back(original, tmp_path, level, monkeypatch, caplog):
    """A reader without the right to rename must neither fail nor try the bad step for ever."""
    root = copy(original, tmp_path)
    zeros(root / "6" / "state" / "_METADATA", None)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    assert Manager(root, verify=level).restore().step == 5
    assert "it could not be renamed" in caplog.text
    assert Manager(root).steps() == [5, 6]


def test_fallback_walks_down_and_says_so(original, tmp_path, caplog):
    """One warning per bad step, with the file; when none is left the error names the newest one's."""
    root = copy(original, tmp_path)
    delete(root / "6" / "manifest.json", None)
    assert Manager(root).restore().step == 5
    assert "6/manifest.json is missing; it is now 6.corrupt-1" in caplog.text
    shutil.copytree(original / "6", root / "6")
    delete(root / "6" / "data.json", None)
    delete(root / "5" / "data.json", None)
    with pytest.raises(CorruptCheckpointError, match=r"no step of .* is good; the newest: .*6/data.json is missing"):
        Manager(root).restore()
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == ["5.corrupt-1", "6.corrupt-1", "6.corrupt-2"]


def test_a_quarantined_step_can_be_saved_again(original, tmp_path):
    """The resumed run comes to the same step number."""
    root = copy(original, tmp_path)
    delete(root / "6" / "data.json", None)
    with Manager(root) as manager:
        assert manager.restore().step == 5
        manager.save(6, expected(6))
        check(manager.restore().state, 6)


def test_a_step_copied_to_another_number_is_refused(original, tmp_path):
    """Its bytes are good but they are those of another step."""
    root = copy(original, tmp_path)
    shutil.copytree(root / "5", root / "7")
    with pytest.raises(CorruptCheckpointError, match="belongs to step 5"):
        Manager(root).restore(step=7)


def test_files_that_desktops_leave_are_ignored(original, tmp_path):
    """A hidden file is no damage."""
    root = copy(original, tmp_path)
    (root / "6" / ".DS_Store").write_text("x")
    assert Manager(root).restore().step == 6


def test_a_later_schema_is_not_corruption(original, tmp_path):
    """An older release must not move aside what a newer one wrote."""
    import xxhash

    root = copy(original, tmp_path)
    file = root / "6" / "manifest.json"
    body = json.loads(file.read_text())
    body.pop("digest")
    body["schema"] = 99
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    file.write_text(json.dumps(body | {"digest": xxhash.xxh3_128_hexdigest(text.encode())}))
    with pytest.raises(ValueError, match="schema 99") as caught:
        Manager(root).restore()
    assert not isinstance(caught.value, CorruptCheckpointError)
    assert Manager(root).steps() == [5, 6]


def test_manifest_describes_the_step(original):
    """The manifest is what tools read instead of the arrays."""
    manifest = Manifest.read(original / "6")
    assert str(manifest.leaves["w"]) == "float32[257,33]"
    assert str(manifest.leaves["n/step"]) == "a Python int"
    assert manifest.leaves["w"].sharding
    assert manifest.meta == {"s": 6}
    assert len(manifest.data) == 32
    assert manifest.versions["orbax-checkpoint"]
    assert manifest.size == sum(
        p.stat().st_size for p in (original / "6").rglob("*") if p.is_file() and p.name != "manifest.json"
    )


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "1", '{"digest": 3}', "[" * 100_000, "\xff"])
def test_manifests_that_are_not_manifests(original, tmp_path, text):
    """Every kind of nonsense gives the same clear error."""
    root = copy(original, tmp_path)
    (root / "6" / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json"):
        Manifest.read(root / "6")
