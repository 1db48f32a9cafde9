"""Datasets that Hugging Face's ``save_to_disk`` wrote, read without its library."""

import json
import os
from typing import Any

from dovetail_data._errors import CorpusError
from dovetail_data.arrow_files import require_pyarrow, saved_rows
from dovetail_data.corpus import Corpus
from dovetail_data.files import File, FileCorpus, find

__all__ = ["ARROW", "hf_dataset"]

ARROW = (".arrow",)
_STATE = "state.json"
_SPLITS = "dataset_dict.json"


def hf_dataset(directory: str | os.PathLike[str], *, column: str = "text") -> Corpus:
    """Return a corpus with one document per row of a dataset saved on disk (needs ``dovetail-data[parquet]``).

    Args:
        directory: what ``dataset.save_to_disk`` made, or one split of a ``DatasetDict``; a URL needs
            ``dovetail-data[fsspec]``.
        column: the string column that holds the text.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        FileNotFoundError: the directory does not exist.
        CorpusError: it holds no saved dataset, several splits, or a shuffled or selected dataset whose rows were not
            written in their order; while iterating: a file is damaged, or has no such column of strings, or a null.
    """
    require_pyarrow("a saved dataset")
    found = {file.name: file for file in find(directory, (_STATE, _SPLITS, *ARROW))}
    return FileCorpus(_shards(str(directory), found), lambda file: saved_rows(file, column))


def _shards(directory: str, found: dict[str, File]) -> list[File]:
    """Return the files that the state lists, in its order."""
    if _SPLITS in found:
        splits = _load(found[_SPLITS]).get("splits")
        raise CorpusError(f"{directory} holds the splits {splits}; expected one of them: add its name to the path")
    if _STATE not in found:
        raise CorpusError(f"{directory} has no {_STATE}; expected a directory that save_to_disk made")
    state = _load(found[_STATE])
    if state.get("_indices_data_files"):
        raise CorpusError(f"{directory} is an index into other rows; expected flatten_indices() before save_to_disk")
    names = [str(entry.get("filename")) for entry in state.get("_data_files") or []]
    missing = [name for name in names if name not in found]
    if missing or not names:
        raise CorpusError(f"{directory} lists the files {names} and lacks {missing}; expected all and at least one")
    return [found[name] for name in names]


def _load(file: File) -> dict[str, Any]:
    with file.open() as stream:
        try:
            value = json.loads(stream.read())
        except ValueError as error:
            raise CorpusError(f"{file.where} is not JSON ({error}); expected what save_to_disk writes") from error
    if not isinstance(value, dict):
        raise CorpusError(f"{file.where} is {value!r:.80}; expected an object")
    return value
