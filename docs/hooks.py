"""What pages write in double braces.

`include FILE` is a README or guide of the repository, `api MODULE` its public names, `call MODULE:FUNCTION` what a
function without arguments returns.

Links between included files become links between pages. The names are those of the module's `__all__` and no others.
"""

import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INCLUDE = re.compile(r"^\{\{ include (\S+) \}\}$", re.MULTILINE)
API = re.compile(r"^\{\{ api (\S+) \}\}$", re.MULTILINE)
CALL = re.compile(r"^\{\{ call (\S+):(\S+) \}\}$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write out the included files and the names of modules."""
    here = posixpath.dirname(page.file.src_uri)
    markdown = INCLUDE.sub(lambda found: included(found[1], here), markdown)
    markdown = CALL.sub(lambda found: getattr(importlib.import_module(found[1]), found[2])(), markdown)
    return API.sub(lambda found: "\n\n".join(names(found[1])), markdown)


def names(module: str) -> list[str]:
    """One mkdocstrings directive for each public name, at the place that defines it."""
    loaded = importlib.import_module(module)
    public = [(name, getattr(loaded, name)) for name in loaded.__all__]
    return [f"::: {where(module, name, value)}" for name, value in public if not isinstance(value, type(re))]


def where(module: str, name: str, value: Any) -> str:
    """The module and name of a class or function; a constant or alias stays where it is exported."""
    home = getattr(value, "__module__", "") or ""
    if not home.startswith("dovetail") or getattr(value, "__qualname__", "") != name:
        return f"{module}.{name}"
    return f"{home}.{name}"


def included(name: str, here: str) -> str:
    """The text of a file of the repository with its links as seen from a folder of the site."""
    path = ROOT / name
    return LINK.sub(lambda found: link(found[1], (path.parent / found[2]).resolve(), here), path.read_text())


def link(text: str, target: Path, here: str) -> str:
    """A link to the page of a file, or the text alone where the site has none."""
    if not target.exists():
        raise FileNotFoundError(f"a link with the text {text!r} leads to {target}, which does not exist")
    inside = target.relative_to(ROOT)
    if inside.parts[0] == "packages" and len(inside.parts) > 1:
        page = f"packages/{inside.parts[1]}.md"
    elif inside.name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        page = "index.md" if inside.name == "README.md" else f"{inside.stem.lower()}.md"
    elif inside.parts[0] == "docs" and inside.suffix == ".md":
        page = inside.relative_to("docs").as_posix()
    else:
        return text
    return f"[{text}]({posixpath.relpath(page, here or '.')})"
