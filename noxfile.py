"""Everything that checks Dovetail. `uvx nox` runs what a contributor and CI run; `nox -l` lists the rest."""

import hashlib
import itertools
import os
import re
import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
ORACLES = sorted(path.name for path in ROOT.glob("integration/oracles/*") if list(path.glob("test_*.py")))
LOWEST, NEWEST = "3.11", "3.13"
PYTHONS = [LOWEST, "3.12", NEWEST]
EIGHT = {"JAX_NUM_CPU_DEVICES": "8"}
WHEELS = ROOT / ".nox" / "wheels"


def use_pyenv() -> None:
    """Let every Python that pyenv has be found: its shims fail for the versions that are not active."""
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    if not versions.is_dir():
        return
    active = [name for name in os.environ.get("PYENV_VERSION", "").split(":") if name]
    for python in PYTHONS:
        installed = [path.name for path in versions.glob(f"{python}.*") if (path / "bin" / "python").exists()]
        if installed and not any(name.startswith(f"{python}.") for name in active):
            active.append(max(installed, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]))
    os.environ["PYENV_VERSION"] = ":".join(active)
    os.environ.setdefault("UV_PYTHON_DOWNLOADS", "never")
    os.environ.setdefault("UV_PYTHON_PREFERENCE", "only-system")


use_pyenv()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = "CI" in os.environ
DEFAULT = [
    "lint",
    "types",
    "arch",
    "docs",
    f"tests-{LOWEST}",
    f"tests-{NEWEST}",
    "isolated",
    "integration",
    "multiprocess",
]
nox.options.sessions = DEFAULT


def project(package: str) -> dict:
    """The pyproject of a package."""
    return tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())


def distribution(package: str) -> str:
    return project(package)["project"]["name"]


def requirements(package: str) -> list[str]:
    """What a package declares, extras included."""
    content = project(package)["project"]
    return [*content["dependencies"], *itertools.chain(*content.get("optional-dependencies", {}).values())]


def closure(package: str) -> list[str]:
    """The package and all packages of the workspace that it needs, extras included."""
    names, queue = {distribution(name): name for name in PACKAGES}, [package]
    found: list[str] = []
    while queue:
        found.append(queue.pop())
        needed = {names.get(re.match(r"[\w-]+", line)[0]) for line in requirements(found[-1])} - {None}
        queue += sorted(needed - set(found) - set(queue))
    return found


def sync(session: nox.Session, *arguments: str) -> None:
    """Bring the session's environment to the state of the lock."""
    where = session.virtualenv.location
    env = {"UV_PROJECT_ENVIRONMENT": where, "VIRTUAL_ENV": where}
    session.run_install("uv", "sync", "-q", "--frozen", f"--python={session.python}", *arguments, env=env)


def sync_all(session: nox.Session, *groups: str) -> None:
    """Install every package with every extra."""
    sync(session, "--all-packages", "--all-extras", *(f"--group={group}" for group in groups))


def once(session: nox.Session, recipe: list[str]) -> bool:
    """Tell whether the environment was made by another recipe; `done` notes the new one."""
    stamp = Path(session.virtualenv.location) / "recipe"
    return not (stamp.exists() and stamp.read_text() == _digest(recipe))


def done(session: nox.Session, recipe: list[str]) -> None:
    (Path(session.virtualenv.location) / "recipe").write_text(_digest(recipe))


def _digest(recipe: list[str]) -> str:
    return hashlib.sha256("\n".join(recipe).encode()).hexdigest()


def install_lowest(session: nox.Session, package: str) -> None:
    """Install a package and its workspace closure, editable, at the lowest versions that they declare."""
    members = closure(package)
    paths = [
        f"-epackages/{name}" + ("[{}]".format(",".join(_extras(name))) if _extras(name) else "") for name in members
    ]
    recipe = [*paths, *((ROOT / "packages" / name / "pyproject.toml").read_text() for name in members)]
    if once(session, recipe):
        where = session.virtualenv.location
        session.run_install("uv", "venv", "-q", "--clear", f"--python={session.python}", where, external=True)
        session.install("-q", "--resolution=lowest-direct", *paths, f"--group=packages/{package}/pyproject.toml:test")
        done(session, recipe)


def _extras(package: str) -> list[str]:
    return sorted(project(package)["project"].get("optional-dependencies", {}))


@nox.session(python=PYTHONS)
@nox.parametrize("package", PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """A package's tests with its own closure only; on 3.11 at the lowest declared versions."""
    if session.python == LOWEST:
        install_lowest(session, package)
    else:
        sync(session, "--package", distribution(package), "--all-extras", "--group=test")
    session.run("pytest", f"packages/{package}", *workers(package), *session.posargs)


def workers(package: str) -> list[str]:
    """One pytest process per core for packages that ask for pytest-xdist."""
    tools = project(package)["dependency-groups"]["test"]
    return ["--numprocesses=auto"] if any(line.startswith("pytest-xdist") for line in tools) else []


@nox.session(python=NEWEST, reuse_venv=False)
@nox.parametrize("package", PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """The built wheel alone, outside the repository: it imports, its README runs, nothing undeclared is there."""
    build_wheels(session)
    names = [distribution(name) for name in closure(package)]
    wheel = next(WHEELS.glob(f"{distribution(package).replace('-', '_')}-*.whl"))
    old = [word for name in names for word in ("--reinstall-package", name)]
    session.install("-q", f"--find-links={WHEELS}", *old, str(wheel))
    script = ROOT / "integration" / "isolated.py"
    session.chdir(session.create_tmp())
    session.run("python", str(script), package, env=EIGHT)


def build_wheels(session: nox.Session) -> None:
    shutil.rmtree(WHEELS, ignore_errors=True)
    session.run_install("uv", "build", "-q", "--all-packages", "--wheel", f"--out-dir={WHEELS}", external=True)


@nox.session(python=NEWEST)
def integration(session: nox.Session) -> None:
    """Cross-package tests and short pipelines."""
    sync_all(session, "dev")
    session.run("pytest", "integration/tests", "-m", "not multiprocess and not browser", *session.posargs)


@nox.session(python=NEWEST)
def multiprocess(session: nox.Session) -> None:
    """Tests with several real jax.distributed processes on the CPU."""
    sync_all(session, "dev")
    session.run("pytest", "integration/tests", "-m", "multiprocess", *session.posargs)


@nox.session(python=NEWEST)
def lint(session: nox.Session) -> None:
    """Style, formatting, and a lock that matches the packages."""
    sync(session, "--only-group=lint")
    session.run("ruff", "check", *(session.posargs or ["."]))
    session.run("ruff", "format", "--check", *(session.posargs or ["."]))
    session.run("uv", "lock", "--check", external=True)


@nox.session(python=NEWEST)
def types(session: nox.Session) -> None:
    """Static types."""
    sync_all(session, "types")
    sources = [f"packages/{package}/src" for package in PACKAGES]
    session.run("basedpyright", f"--pythonpath={session.virtualenv.location}/bin/python", *(session.posargs or sources))


@nox.session(python=NEWEST)
def arch(session: nox.Session) -> None:
    """Who may import whom."""
    sync_all(session, "arch")
    session.run("lint-imports", "--no-cache")


@nox.session(python=NEWEST)
def docs(session: nox.Session) -> None:
    """The site builds without a warning, and every code block runs."""
    sync_all(session, "docs")
    session.run(
        "mkdocs",
        "build",
        "--quiet",
        "--strict",
        f"--site-dir={session.create_tmp()}/site",
        env={"NO_MKDOCS_2_WARNING": "1"},
    )
    session.run("pytest", "docs", *session.posargs, env=EIGHT)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """The default sessions for every package, and the tests on the Pythons in between."""
    for name in ("lint", "types", "arch", "docs"):
        session.notify(name)
    for package in PACKAGES:
        for python in PYTHONS:
            session.notify(f"tests-{python}(package={package!r})")
        session.notify(f"isolated(package={package!r})")
    session.notify("integration")
    session.notify("multiprocess")


@nox.session(python=NEWEST)
def soak(session: nox.Session) -> None:
    """The same tests with the long counts: kills, fuzzing, large plans. Arguments are packages."""
    sync_all(session, "dev")
    session.env["DOVETAIL_SOAK"] = "1"
    for package in session.posargs or PACKAGES:
        session.run("pytest", f"packages/{package}/tests", *workers(package), "--timeout=3600")
    if not session.posargs:
        session.run("pytest", "integration/tests", "-m", "not browser", "--timeout=3600")


@nox.session(python=NEWEST)
def browser(session: nox.Session) -> None:
    """Pages in a real headless Chromium."""
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        session.skip("no Chromium is installed (Debian: apt-get install chromium)")
    sync_all(session, "dev")
    session.run("pytest", "integration/tests", "-m", "browser", *session.posargs)


@nox.session(python=LOWEST, venv_backend="venv")
@nox.parametrize("name", ORACLES)
def oracle(session: nox.Session, name: str) -> None:
    """Against independent implementations, in an environment of their own; pip, which knows PyTorch's CPU builds."""
    peers = (ROOT / f"integration/oracles/{name}/requirements.txt").read_text()
    recipe = [name, peers, *((ROOT / "packages" / package / "pyproject.toml").read_text() for package in PACKAGES)]
    if once(session, recipe):
        known = {distribution(package) for package in PACKAGES}
        lines = [line for package in PACKAGES for line in requirements(package)]
        ours = sorted({line for line in lines if re.match(r"[\w-]+", line)[0] not in known})
        session.install("-q", *peers.split())
        session.install("-q", *ours, "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "sybil")
        session.install("-q", "--no-deps", *(f"-epackages/{package}" for package in PACKAGES))
        done(session, recipe)
    session.run("python", "-m", "pytest", f"integration/oracles/{name}", "--numprocesses=auto", *session.posargs)


@nox.session(python=NEWEST)
def bench(session: nox.Session) -> None:
    """A benchmark against its peer: nox -s bench -- NAME [--json] [--seed N]."""
    session.run("python", "integration/benchmarks/harness.py", *(session.posargs or ["--help"]))


@nox.session(python=NEWEST)
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU."""
    if not Path("/dev/nvidia0").exists():
        session.skip("no NVIDIA GPU is present")
    sync_all(session, "dev")
    session.install("-q", "jax[cuda12]")
    session.run("pytest", "packages", "-m", "gpu", env={"JAX_PLATFORMS": ""}, success_codes=[0, 5])
