"""A server as a contestant, with a small program in the place of ours and the peer's."""

import sys
import time
from pathlib import Path

import harness

BENCHMARKS = Path(harness.__file__).parent
SMALL = {"d": 128, "layers": 1, "heads": 2, "ff": 64, "vocab": 512, "time": 64}
CASE = {"requests": 5, "at_once": 2, "prompt": 16, "output": 8, "seed": 0, "model": SMALL}

FILE = """
import sys
import llama
from pathlib import Path
llama.FOLDER = Path(FOLDER)
from serving import Served

class Fake(Served):
    name, package = "fake, pytest", "pytest"
    def command(self, model, c):
        return [sys.executable, SERVER, "{port}", str(model)]
"""

SERVER = """
import http.server, json, os, pathlib, sys, time
cache = pathlib.Path(os.environ["XDG_CACHE_HOME"], "compiled")
if not cache.exists():  # "compiles"
    time.sleep(3)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.touch()
assert pathlib.Path(sys.argv[2], "model.safetensors").exists()
block = bytearray(os.urandom(1000)) * 40_000

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(json.dumps({"data": [{"id": "fake"}]}))
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = request["max_tokens"]
        events = [{"choices": [{"text": " w"}]}] * count + [{"choices": [], "usage": {"completion_tokens": count}}]
        self.reply("".join(f"data: {json.dumps(event)}\\n\\n" for event in events) + "data: [DONE]\\n\\n")
    def reply(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_cold_and_warm_and_ends_with_its_worker(tmp_path):
    """The second start finds the cache of the first; no server outlives the benchmark or works while it is stopped."""
    (tmp_path / "server.py").write_text(SERVER)
    text = FILE.replace("FOLDER)", f"{str(tmp_path / 'model')!r})").replace("SERVER", repr(str(tmp_path / "server.py")))
    (tmp_path / "fake.py").write_text(text)
    worker = harness.Worker(
        "Fake", [sys.executable, str(BENCHMARKS / "worker.py"), str(tmp_path / "fake.py"), "Fake"], 1, 60
    )
    try:
        assert worker.ask(do="prepare", config=CASE)["name"].startswith("fake, pytest ")
        answer = worker.ask(do="run", n=1)
        servers = [pid for pid in group(worker.process.pid) if pid != worker.process.pid]
        assert len(servers) == 1
        wait(lambda: state(servers[0]) == "T")
    finally:
        worker.close()
    assert 3 < answer["extra"]["ready_cold_s"] < 30
    assert answer["extra"]["ready_warm_s"] < answer["extra"]["ready_cold_s"] - 1
    assert answer["extra"]["ttft_p50_ms"] > 0
    assert len(answer["checksum"]["tokens"]) == 5
    assert answer["checksum"]["texts"][0] == " w" * answer["checksum"]["tokens"][0]
    assert 40 < answer["memory"] < 150
    wait(lambda: state(servers[0]) in ("", "Z"))


def wait(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def group(leader):
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if stat(pid)[2:3] == [str(leader)] and state(pid) != "Z"]


def state(pid):
    return (stat(pid) or [""])[0]


def stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []
