"""Names of the hub against a local server that answers as the hub does, well and badly."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from dovetail_models import HubError, convert, from_pretrained
from dovetail_models.commands import Describe
from dovetail_models.hub import located
from dovetail_protocols import CommandError

NAME = "someone/model.v1"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}
CODES = {"gated": (403, "GatedRepo"), "unauthorized": (401, "RepoNotFound"), "absent": (404, "RepoNotFound")}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's interface that a download of a snapshot uses."""

    files: dict[str, bytes]
    mode: str
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if self.mode in CODES:
            status, code = CODES[self.mode]
            return self.reply(status, b"{}", {"X-Error-Code": code})
        if parts[:2] == ["api", "models"]:
            return self.listing(parts[4:])
        if "/".join(parts[:2]) == NAME and parts[2] == "resolve":
            return self.file(parts[3], "/".join(parts[4:]))
        return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def listing(self, rest: list[str]) -> None:
        if rest[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        commit = COMMITS.get(rest[1] if rest else "main")
        if commit is None:
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        names = [{"rfilename": name} for name in self.files]
        return self.reply(200, json.dumps({"id": NAME, "sha": commit, "siblings": names}).encode())

    def file(self, commit: str, name: str) -> None:
        data = self.files[name]
        headers = {"ETag": f'"{sha1(data).hexdigest()}"', "X-Repo-Commit": commit}
        broken = self.mode == "truncated" and name.endswith(".safetensors")
        self.reply(200, data, headers, sent=len(data) // 2 if broken else None)

    def reply(self, status: int, data: bytes, headers: Any = (), sent: int | None = None) -> None:
        self.send_response(status)
        for header, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that has one model, and an empty cache."""
    files = {path.name: path.read_bytes() for path in (golden / "old_style_shards").iterdir()}
    kind = type("OneHub", (Hub,), {"files": files | {"weights.bin": b"x"}, "mode": "well", "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    kind.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", kind.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = kind.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    monkeypatch.chdir(tmp_path)
    yield kind
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_name(hub: Any) -> None:
    """The model of the main branch; what it does not need is not downloaded; a second time nothing is."""
    model = from_pretrained(NAME)
    assert model.config.tied
    assert not [path for path in hub.asked if path.endswith(("weights.bin", "expected.npz"))]
    assert any("model-00002-of-00002.safetensors" in path for path in hub.asked)
    hub.asked.clear()
    folder = located(NAME)
    assert folder.name == COMMITS["main"]
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    assert convert(NAME, "made", dtype="float32").is_dir()


def test_revisions(hub: Any) -> None:
    """A branch or tag; one that is not there is an error."""
    assert located(NAME, "v2").name == COMMITS["v2"]
    with pytest.raises(HubError, match=r"someone/model.v1 at revision 'v3' .*RevisionNotFoundError"):
        from_pretrained(NAME, revision="v3")


def test_a_directory_wins(hub: Any, golden: Path) -> None:
    """A local copy is never replaced by a download."""
    Path(NAME).parent.mkdir()
    Path(NAME).symlink_to(golden / "mha")
    assert not from_pretrained(NAME).config.tied
    assert hub.asked == []
    with pytest.raises(ValueError, match="revision='v2' of the path"):
        from_pretrained(NAME, revision="v2")
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face model directory"):
        from_pretrained(Path("someone/else"))
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face model directory"):
        from_pretrained("a/b/c")


@pytest.mark.parametrize(
    ("mode", "message"),
    [("absent", "RepositoryNotFoundError"), ("gated", "GatedRepoError"), ("unauthorized", "401")],
)
def test_refusals(mode: str, message: str, hub: Any) -> None:
    """No such model, one that asks for consent, one that asks for a token."""
    hub.mode = mode
    with pytest.raises(HubError, match=f"could not be had from the hub: (.|\n)*{message}"):
        from_pretrained(NAME)
    with pytest.raises(CommandError, match="could not be had from the hub"):
        Describe(NAME).run()


def test_truncated(hub: Any) -> None:
    """A connection that breaks gives no half model, and the next attempt is whole."""
    hub.mode = "truncated"
    with pytest.raises(HubError, match="could not be had from the hub"):
        from_pretrained(NAME)
    hub.mode = "well"
    assert from_pretrained(NAME).config.tied


@pytest.mark.parametrize("cut", [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)], ids=str)
def test_no_network(cut: tuple[str, Any], hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache is used, what is not is an error."""
    with monkeypatch.context() as patch:
        patch.setattr(constants, *cut)
        with pytest.raises(HubError, match="could not be had from the hub"):
            from_pretrained(NAME)
    from_pretrained(NAME)
    monkeypatch.setattr(constants, *cut)
    assert from_pretrained(NAME).config.tied


def test_without_the_extra(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names what to install."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"no directory someone/model\.v1; .*dovetail-models\[hub\]"):
        from_pretrained(NAME)


def test_by_environment(hub: Any, tmp_path: Path) -> None:
    """A process of its own with ``HF_ENDPOINT``, as users set it; the library is imported for a name only."""
    program = (
        "import sys; from dovetail_models.hub import located; assert 'huggingface_hub' not in sys.modules;"
        f"print(located({NAME!r}, 'v2'))"
    )
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True, timeout=120)
    assert Path(done.stdout.decode().strip()) == tmp_path / "other/models--someone--model.v1/snapshots" / COMMITS["v2"]
