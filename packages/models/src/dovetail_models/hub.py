"""Names of the Hugging Face hub as directories: downloaded once, kept in the hub's own cache."""

import os
import re
from pathlib import Path

from dovetail_models.hf_files import TOKENIZER_FILES

__all__ = ["HubError", "located"]

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WANTED = ["*.json", "*.safetensors", *TOKENIZER_FILES]


class HubError(OSError):
    """A model could not be had from the Hugging Face hub; the message says why."""


def located(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return a directory as it is, and that of a download for a name of the hub.

    Args:
        path: a directory, which wins, or as a string a name such as ``"org/name"``.
        revision: branch, tag or commit of the hub; None for its main branch.

    Raises:
        HubError: no such name or revision, no permission, no network and nothing in the cache, a download that broke
            off, or the extra ``hub`` is not installed.
        ValueError: a revision of a directory.
    """
    if not isinstance(path, str) or Path(path).exists() or not NAME.fullmatch(path):
        if revision is not None:
            raise ValueError(f"revision={revision!r} of the path {path}; expected one with a name of the hub only")
        return Path(path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise HubError(
            f"there is no directory {path}; to download a model of that name, pip install 'dovetail-models[hub]'"
        ) from error
    failures = [kind for kind in HfHubHTTPError.__bases__ if issubclass(kind, Exception)]  # of HTTP, and OSError
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=WANTED))
    except (ValueError, *failures) as error:
        at = "" if revision is None else f" at revision {revision!r}"
        raise HubError(
            f"{path}{at} is no directory and could not be had from the hub: {type(error).__name__}: {error}"
        ) from error
