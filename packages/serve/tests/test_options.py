"""Options that no server can keep are refused when they are made."""

import dataclasses

import pytest

from dovetail_serve import ServeOptions

WRONG = {
    "max_queue": 0,
    "max_body_bytes": 0,
    "drain_seconds": -1.0,
    "read_seconds": 0.0,
    "write_seconds": float("inf"),
    "completion_tokens": 0,
    "chat_tokens": 0,
    "context_length": 1,
    "prompt_prefix": (-1,),
    "metrics_prefix": "1-",
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ServeOptions)])
def test_wrong_options(name):
    """A limit makes no sense and shows only under load."""
    with pytest.raises(ValueError, match=f"{name}="):
        ServeOptions(**{name: WRONG[name]})


def test_default_lengths(launch):
    """The defaults of max_tokens cannot be set."""
    with launch(options=ServeOptions(completion_tokens=3, chat_tokens=5)) as api:
        assert api.post("completions")[1]["usage"]["completion_tokens"] == 3
        assert api.post("chat/completions")[1]["usage"]["completion_tokens"] == 5
