"""What tests of adapters of peft share: comparing adapters, and directories that are changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dovetail_protocols import paths
from dovetail_weights import SafetensorsFile, write_directory


def same(one: Any, other: Any) -> None:
    first, second = paths.flatten(one), paths.flatten(other)
    assert first.keys() == second.keys()
    for address, value in first.items():
        np.testing.assert_array_equal(value, second[address], err_msg=address)


def edited(folder: Path, **changes: Any) -> Path:
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))
    return folder


def rewritten(folder: Path, **changes: Any) -> Path:
    """Replace tensors of the adapter; None takes one out."""
    held = SafetensorsFile(folder / "adapter_model.safetensors")
    tensors = {name: held.read(name).copy() for name in held}
    for name, value in changes.items():
        tensors.pop(name, None) if value is None else tensors.update({name: value})
    text = (folder / "adapter_config.json").read_text()
    shutil.rmtree(folder)
    return write_directory(folder, tensors, extra_files={"adapter_config.json": text}, stem="adapter_model")


def without(folder: Path, part: str) -> Path:
    """Take the tensors of modules out."""
    held = SafetensorsFile(folder / "adapter_model.safetensors")
    return rewritten(folder, **{name: None for name in held if part in name})
