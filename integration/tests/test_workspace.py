"""What holds for every package: files, declared dependencies, imports, entry points, wheels."""

import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = {p.parent.name: tomllib.loads(p.read_text()) for p in sorted(ROOT.glob("packages/*/pyproject.toml"))}
PACKAGES = list(PROJECTS)
CLOSURES = tomllib.loads((ROOT / "integration" / "closures.toml").read_text())
# Import names that differ from their distribution's.
IMPORTS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint", "ml_dtypes": "ml-dtypes"}
MODULES = {"pyyaml": "yaml", "orbax-checkpoint": "orbax.checkpoint"}
BUDGET = 0.3


def module_of(package):
    return "dovetail" if package == "dovetail" else f"dovetail_{package}"


def source_of(package):
    return ROOT / "packages" / package / "src" / module_of(package)


def declared(package, *, extras=True):
    content = PROJECTS[package]["project"]
    lines = [*content["dependencies"]]
    for extra in content.get("optional-dependencies", {}).values():
        lines += extra if extras else []
    return {re.match(r"[\w-]+", line)[0]: line for line in lines}


@pytest.mark.parametrize("package", PACKAGES)
def test_files(package):
    """A package that lacks one of these cannot be lifted out or released."""
    folder = ROOT / "packages" / package
    for name in ("README.md", "CHANGELOG.md", "LICENSE"):
        assert (folder / name).stat().st_size > 10, name
    assert (folder / "changes").is_dir()
    assert (source_of(package) / "py.typed").exists()
    assert list((folder / "tests").glob("test_*.py"))
    assert (folder / "README.md").read_text().startswith(f"# {PROJECTS[package]['project']['name']}\n")
    notes = [p for p in (folder / "changes").iterdir() if p.suffix == ".md"]
    released = "## " in (folder / "CHANGELOG.md").read_text()
    assert notes or released, "neither a changelog entry nor a fragment"
    kinds = {"feature", "bugfix", "doc", "removal", "misc"}
    assert all(p.name.split(".")[-2] in kinds for p in notes)


@pytest.mark.parametrize("package", PACKAGES)
def test_projects_agree(package):
    """One Python floor, one licence, one build backend; workspace dependencies are compatible ranges, never pins."""
    content = PROJECTS[package]
    assert content["project"]["requires-python"] == ">=3.11"
    assert content["project"]["license"] == "Apache-2.0"
    assert content["build-system"] == {"requires": ["uv_build>=0.9,<1"], "build-backend": "uv_build"}
    sources = content.get("tool", {}).get("uv", {}).get("sources", {})
    for name, line in declared(package).items():
        if name.startswith("dovetail-"):
            assert re.sub(r"\[.*\]", "", line) == f"{name}>=0.1,<0.2"
            assert sources.get(name) == {"workspace": True}
        elif name != "dovetail":
            assert ">=" in line, f"{line} has no lower bound"
            assert "==" not in line


@pytest.mark.parametrize("package", PACKAGES)
def test_closure_table(package):
    """A new dependency is a decision: it shows in integration/closures.toml as well."""
    names, queue = {PROJECTS[p]["project"]["name"]: p for p in PACKAGES}, [package]
    ours, third_party = set(), set()
    while queue:
        ours.add(queue[0])
        for name in declared(queue.pop(0), extras=False):
            if name not in names:
                third_party.add(name)
            elif names[name] not in ours:
                queue.append(names[name])
    assert sorted(ours) == CLOSURES[package]["packages"]
    assert sorted(third_party) == CLOSURES[package]["third-party"]


def imported(package):
    found = {}
    for path in source_of(package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], path.name)
    return {name: where for name, where in found.items() if name not in sys.stdlib_module_names}


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_declared_and_used(package):
    """An undeclared import works only as long as another package happens to bring it."""
    names = {IMPORTS.get(name, name.replace("_", "-")): where for name, where in imported(package).items()}
    names.pop(PROJECTS[package]["project"]["name"])
    undeclared = {name: where for name, where in names.items() if name not in declared(package)}
    assert not undeclared
    unused = {name for name in declared(package, extras=False) if name not in names}
    assert not unused


PROBE = """
import importlib, json, logging, os, sys, threading
for name in {others}:
    importlib.import_module(name)  # what these do is theirs
before = (dict(os.environ), set(threading.enumerate()), sorted(os.listdir(".")), list(logging.getLogger().handlers))
import {module}
after = (dict(os.environ), set(threading.enumerate()), sorted(os.listdir(".")), list(logging.getLogger().handlers))
bridge = sys.modules.get("jax._src.xla_bridge")
print(json.dumps({{
    "changed": [n for n, a, b in zip(("environment", "threads", "files", "handlers"), before, after) if a != b],
    "backends": list(bridge._backends) if bridge else [],
    "loggers": [n for n, l in logging.root.manager.loggerDict.items()
                if n.startswith("dovetail") and getattr(l, "handlers", None)],
    "testing": [name for name in sys.modules if name.startswith("dovetail") and ".testing" in name],
}}))
"""


def python(*arguments, cwd):
    env = {name: value for name, value in os.environ.items() if not name.startswith("DOVETAIL")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("package", PACKAGES)
def test_import_is_cheap_and_changes_nothing(package, tmp_path):
    """Our own modules' time (-X importtime, without what they import) stays under the budget; no side effects."""
    others = [MODULES.get(name, name.replace("-", "_")) for name in CLOSURES[package]["third-party"]]
    probe = PROBE.format(module=module_of(package), others=others)
    times = []
    for _ in range(3):
        done = python("-X", "importtime", "-c", probe, cwd=tmp_path)
        lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \| +([\w.]+)", done.stderr)
        times.append(sum(int(us) for us, name in lines if name.split(".")[0].startswith("dovetail")) / 1e6)
        if times[-1] < BUDGET:
            break
    found = json.loads(done.stdout)
    assert found == {"changed": [], "backends": [], "loggers": [], "testing": []}
    assert min(times) < BUDGET


def commands():
    found = [(p, n, t) for p in PACKAGES for n, t in _entries(p).items()]
    return [pytest.param(*entry, id=entry[1]) for entry in found]


def _entries(package):
    return PROJECTS[package]["project"].get("entry-points", {}).get("dovetail.commands", {})


@pytest.mark.parametrize(("package", "name", "target"), commands())
def test_commands_are_frozen_dataclasses(package, name, target):
    """The command line builds flags, files and help from the dataclass alone."""
    module, _, attribute = target.partition(":")
    assert module.split(".")[0] == module_of(package)
    command = getattr(importlib.import_module(module), attribute)
    assert dataclasses.is_dataclass(command)
    assert command.__dataclass_params__.frozen
    assert callable(command.run)
    assert (command.__doc__ or "").strip()
    installed = {entry.name: entry.value for entry in metadata.entry_points(group="dovetail.commands")}
    assert installed[name] == target, "the installed entry points are stale"


@pytest.mark.parametrize("module", sorted({entry.values[2].partition(":")[0] for entry in commands()}))
def test_commands_import_lightly(module, tmp_path):
    """`dovetail --help` imports every command's module, so these load no jax and nothing that takes seconds."""
    program = (
        f"import sys, {module}; print([m for m in ('jax', 'orbax', 'grain', 'flax', 'torch') if m in sys.modules])"
    )
    assert python("-c", program, cwd=tmp_path).stdout.strip() == "[]"


def test_names_of_commands_are_unique():
    names = [entry.id for entry in commands()]
    assert len(names) == len(set(names))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheels")
    command = ["uv", "build", "-q", "--all-packages", "--wheel", f"--out-dir={out}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return {path.name.split("-")[0]: path for path in out.glob("*.whl")}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheels_hold_the_package_and_nothing_else(package, wheels):
    """Tests, notebooks or caches in a wheel reach every user."""
    module = module_of(package)
    with zipfile.ZipFile(wheels[module]) as wheel:
        names = wheel.namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {module, f"{module}-{PROJECTS[package]['project']['version']}.dist-info"}
    assert f"{module}/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    sources = {str(p.relative_to(source_of(package).parent)) for p in source_of(package).rglob("*.py")}
    assert sources <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_everything_is_in_the_linter_and_the_site():
    """A new package is covered by the layer contracts and has a page."""
    linter = (ROOT / ".importlinter").read_text().split()
    for package in PACKAGES:
        assert module_of(package) in linter
        assert (ROOT / "docs" / "packages" / f"{package}.md").exists()
        assert f"packages/{package}.md" in (ROOT / "mkdocs.yml").read_text()
    assert sorted(CLOSURES) == PACKAGES
