import json

import pytest

from dovetail_text import Tokenizer, TokenizerError, files


@pytest.fixture
def saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def test_round_trip(tokenizer, saved):
    """Something is lost between save and load."""
    again = Tokenizer.from_pretrained(str(saved))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.eos_ids == tokenizer.eos_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens == tokenizer.special_tokens
    assert not list(saved.glob(".*"))
    again.save_pretrained(saved / "b")
    for file in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (saved / file).read_bytes() == (saved / "b" / file).read_bytes()


def test_where_the_template_comes_from(saved):
    """Of two templates the wrong one is used."""
    config = saved / "tokenizer_config.json"
    edit(config, chat_template="from config")
    (saved / "chat_template.jinja").write_text("from file\r\n")
    assert Tokenizer.from_pretrained(saved).chat_template == "from file\r\n"
    (saved / "chat_template.jinja").unlink()
    assert Tokenizer.from_pretrained(saved).chat_template == "from config"
    edit(config, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer.from_pretrained(saved).chat_template == "d"
    edit(config, chat_template=None)
    assert Tokenizer.from_pretrained(saved).chat_template is None


def test_saving_without_template_leaves_no_old_one(saved, tokenizer):
    """A stale template file speaks for another tokenizer."""
    Tokenizer((saved / "tokenizer.json").read_text()).save_pretrained(saved)
    assert Tokenizer.from_pretrained(saved).chat_template is None
    assert Tokenizer.from_pretrained(saved).eos_ids == ()


def test_end_tokens_from_all_sources(saved):
    """A reply does not end because one of the end ids was not read."""
    (saved / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.from_pretrained(saved).eos_ids == (2,)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2, 99999]}))
    assert Tokenizer.from_pretrained(saved).eos_ids == (2, 0)
    (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert Tokenizer.from_pretrained(saved).eos_ids == (2, 0)
    (saved / "tokenizer_config.json").unlink()
    (saved / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}))
    again = Tokenizer.from_pretrained(saved)
    assert (again.bos_id, again.eos_ids) == (1, (2, 0))


def test_missing_files(tmp_path):
    """A missing file gives an error that does not say what was found or what to do."""
    with pytest.raises(FileNotFoundError, match="no directory"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model.*save_pretrained"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_malformed_files(saved, file, content):
    """A damaged file passes or raises something else."""
    (saved / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=r"JSON|UTF-8|object"):
        Tokenizer.from_pretrained(saved)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"eos_token": 3}, "eos_token is 3"),
        ({"eos_token": "<nope>"}, "not in the vocabulary"),
        ({"eos_tokens": [1]}, "eos_tokens"),
        ({"chat_template": 3}, "chat_template is 3"),
    ],
)
def test_wrong_values(saved, values, match):
    """A wrong value in the configuration is ignored."""
    (saved / "chat_template.jinja").unlink()
    edit(saved / "tokenizer_config.json", **values)
    with pytest.raises(TokenizerError, match=match):
        Tokenizer.from_pretrained(saved)


def test_unwritable_target(tokenizer, tmp_path):
    """Saving to a place that cannot be written seems to work."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        tokenizer.save_pretrained(tmp_path / "file")


def test_interrupted_save_keeps_the_old_files(tokenizer, saved, monkeypatch):
    """A crash while saving leaves half a file under the real name, or litter."""
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        tokenizer.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("written", range(4))
def test_an_interrupted_save_is_no_tokenizer(tokenizer, tmp_path, monkeypatch, written):
    """A directory whose writer was killed reads as a tokenizer that lacks its template or its special tokens."""
    replace, count = files._replace, iter(range(10))

    def interrupted(path, text):
        if next(count) == written:
            raise KeyboardInterrupt
        replace(path, text)

    monkeypatch.setattr(files, "_replace", interrupted)
    try:
        tokenizer.save_pretrained(tmp_path)
    except KeyboardInterrupt:
        with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
            Tokenizer.from_pretrained(tmp_path)
    else:
        assert Tokenizer.from_pretrained(tmp_path).fingerprint == tokenizer.fingerprint
