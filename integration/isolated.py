"""Run by `nox -s isolated` where one wheel is installed and nothing else: ``python isolated.py PACKAGE``.

The package imports, the Python blocks of its README (read from the wheel's metadata) run, and every installed
distribution belongs to the closure of what the package may bring (`closures.toml`).
"""

import importlib
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ALLOWED_TOOLS = {"pip", "setuptools", "wheel"}


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(name: str) -> set[str]:
    """The installed distributions that one needs, whatever the extras."""
    lines = metadata.distribution(name).requires or []
    names = {normal(re.match(r"[\w.-]+", line)[0]) for line in lines}
    return {n for n in names if n in installed()}


def installed() -> set[str]:
    """The names of the distributions in this environment."""
    return {normal(dist.metadata["Name"]) for dist in metadata.distributions()}


def closure(roots: set[str]) -> set[str]:
    """The roots and everything that they need."""
    found: set[str] = set()
    while roots - found:
        name = min(roots - found)
        found.add(name)
        roots = roots | requirements(name)
    return found


def check_closure(package: str) -> None:
    """Exit with the names of distributions that have no business here."""
    table = tomllib.loads((Path(__file__).parent / "closures.toml").read_text())
    ours = {name for name in installed() if name == "dovetail" or name.startswith("dovetail-")}
    third_party = {normal(name) for name in table[package]["third-party"]}
    expected = {distribution(name) for name in table[package]["packages"]}
    if ours != expected:
        sys.exit(f"{package}: installed Dovetail packages are {sorted(ours)}; expected {sorted(expected)}")
    extra = installed() - ours - closure(third_party & installed()) - ALLOWED_TOOLS
    if extra:
        sys.exit(f"{package}: undeclared distributions are installed: {sorted(extra)}")
    print(f"{package}: {len(installed())} distributions, all of them declared")


def distribution(package: str) -> str:
    """The distribution's name of a package."""
    return "dovetail" if package == "dovetail" else f"dovetail-{package}"


def run_readme(package: str) -> None:
    """Run the README's blocks in order, in one namespace."""
    text = metadata.metadata(distribution(package)).get_payload()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, f"README of {package}", "exec"), namespace)
    print(f"{package}: {len(blocks)} README blocks ran")


def main(package: str) -> None:
    """Check one package."""
    check_closure(package)
    module = importlib.import_module(distribution(package).replace("-", "_"))
    if "site-packages" not in str(module.__file__):
        sys.exit(f"{package} was imported from {module.__file__}, not from its wheel")
    missing = [name for name in getattr(module, "__all__", ()) if not hasattr(module, name)]
    if missing:
        sys.exit(f"{package}: __all__ names what is not there: {missing}")
    run_readme(package)


if __name__ == "__main__":
    main(sys.argv[1])
