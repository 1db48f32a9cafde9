"""Run directories: nothing overwritten silently, resumable at any moment."""

import pytest

from dovetail.directory import RunDirectory
from dovetail.pretrain import unchanged
from dovetail.settings import Settings
from dovetail_protocols import CommandError


def prepare(path, resume=False, overwrite=False):
    return RunDirectory.prepare(path, resume=resume, overwrite=overwrite)


def test_a_run_is_kept_until_told_otherwise(tmp_path):
    run = prepare(tmp_path / "run")
    run.save(Settings(steps=5), {"jax": "1"})
    assert prepare(run.path, resume=True).load() == (Settings(steps=5), {"jax": "1"})
    with pytest.raises(CommandError, match=r"--resume .* --overwrite"):
        prepare(run.path)
    assert prepare(run.path, overwrite=True).load() is None


def test_a_run_killed_before_its_plan_can_start_or_resume(tmp_path):
    prepare(tmp_path / "run")
    assert prepare(tmp_path / "run").load() is None
    assert prepare(tmp_path / "run", resume=True).load() is None


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (lambda p: p.write_text("x"), {}, "is a file"),
        (lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x")), {}, "holds no run"),
        (lambda p: (p.mkdir(), (p / "thesis.txt").write_text("x")), {"overwrite": True}, "holds no run"),
        (lambda p: None, {"resume": True}, "no run to resume"),
        (lambda p: None, {"resume": True, "overwrite": True}, "exclude each other"),
        (lambda p: p.parent.joinpath("file").write_text("x"), {"inside": True}, "cannot write"),
    ],
)
def test_what_is_no_run_is_not_touched(tmp_path, make, options, match):
    path = tmp_path / "run"
    make(path)
    if options.pop("inside", False):
        path = tmp_path / "file" / "run"
    with pytest.raises(CommandError, match=match):
        prepare(path, **options)
    if (tmp_path / "run/thesis.txt").exists():
        assert (tmp_path / "run/thesis.txt").read_text() == "x"


def test_a_damaged_record_is_named(tmp_path):
    run = prepare(tmp_path / "run")
    (run.path / "run.json").write_text('{"settings": {"stepz": 1}, "environment": {}}')
    with pytest.raises(CommandError, match=r"run.json is damaged .*stepz"):
        run.load()


def test_a_resumed_run_keeps_its_settings():
    assert unchanged(Settings(steps=5), {"steps": 5}) == Settings(steps=5)
    with pytest.raises(CommandError, match=r"seed=3, but the run has 0"):
        unchanged(Settings(), {"seed": 3})
