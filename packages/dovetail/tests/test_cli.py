"""The command line: offers what is installed, says what is wrong, exits with a status."""

import importlib.metadata
import subprocess
import sys

import pytest

from dovetail import cli

EXPECTED = {
    "checkpoint ls", "checkpoint show", "checkpoint verify", "data show", "data stats",
    "doctor", "quickstart", "train", "version",
}  # fmt: skip


def test_overview_lists_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert {" ".join(name) for name in cli.commands()} >= EXPECTED
    assert all(name in shown for name in EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*name.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"dovetail {name}" in shown


def test_a_word_lists_its_subcommands(capsys):
    assert cli.main(["checkpoint"]) == 0
    assert "checkpoint verify" in capsys.readouterr().out
    assert cli.main(["checkpoint", "lss"]) == 2


def test_unknown_command_suggests_the_nearest(capsys):
    assert cli.main(["quickstrat"]) == 2
    assert "did you mean quickstart" in capsys.readouterr().err


def test_unknown_flag_is_an_error_with_a_hint(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["quickstart", "--minuts", "1"])
    assert stopped.value.code == 2
    assert "--minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quickstart", "--minutes", "0"], "expected a positive number"),
        (["quickstart", "--steps", "0"], "expected at least 1"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--config", "absent.yaml"], "No such file"),
    ],
)
def test_user_errors_are_one_line_and_status_2(words, message, capsys):
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert "Traceback" not in shown


def test_a_command_whose_package_is_missing_says_so(monkeypatch, capsys):
    point = importlib.metadata.EntryPoint("lost", "dovetail_lost.commands:Lost", cli.GROUP)
    monkeypatch.setattr(cli, "commands", lambda: {("lost",): point})
    assert cli.main(["lost"]) == 2
    assert "not installed" in capsys.readouterr().err


def test_interrupt_exits_with_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_dispatch", lambda words: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["version"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_version_and_doctor_report_a_fitting_installation(capsys):
    assert cli.main(["--version"]) == 0
    assert "dovetail-train" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "ok, first use" in shown
    assert "usable cores" in shown


def test_listing_imports_no_heavy_library():
    """Breaks when a command module imports jax or a CLI library at the top: every invocation would wait for it."""
    code = (
        "import sys; from dovetail.cli import main; main([]); "
        "print([m for m in ('jax', 'tyro', 'orbax', 'grain') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[]"
