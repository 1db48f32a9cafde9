"""Files beside the weights of a Hugging Face directory."""

from pathlib import Path

__all__ = ["FURTHER_FILES", "TOKENIZER_FILES", "files_like", "tokenizer_files"]

TOKENIZER_FILES = ("tokenizer*", "*token*.json", "chat_template*", "vocab*", "merges.txt", "*.tiktoken", "spiece.model")
FURTHER_FILES = (*TOKENIZER_FILES, "generation_config.json", "*processor_config.json", "LICENSE*", "README.md")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files of a directory by name.

    Raises:
        FileNotFoundError: there are none.
    """
    found = files_like(folder, TOKENIZER_FILES)
    if not found:
        raise FileNotFoundError(f"{folder} holds no tokenizer files; expected tokenizer.json or its like")
    return found


def files_like(folder: Path, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files of a directory whose names match one of the patterns."""
    found = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return {file.name: file.read_bytes() for file in found}
