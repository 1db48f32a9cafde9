"""Check shapes and types of every annotated call at run time; let tests import their helpers."""

import sys
from pathlib import Path

import jaxtyping

with jaxtyping.install_import_hook("dovetail_train", "beartype.beartype"):
    import dovetail_train  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
