"""Building a cache: any number of workers, kills, damage, wrong tokenizers."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data_toys import Bytes, NoPickle

from dovetail_data import CacheError, CorpusError, TokenCache, build, build_cache, from_documents
from dovetail_data.corpus import Corpus, Document

TEXTS = [f"{i} é " * (i % 11) for i in range(60)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(build, "_CHUNK_DOCUMENTS", 4)


def files(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def test_tokens_are_the_documents_each_with_its_end(tmp_path):
    """The cache against the tokenizer itself, document by document."""
    cache = build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=200)
    assert len(cache.manifest.shards) > 5
    for i, text in enumerate(TEXTS):
        got = cache.gather(np.array([i]), np.array([0]), cache.lengths[i : i + 1])
        assert got.tolist() == [*text.encode(), 256]
    assert cache.byte_lengths.tolist() == [len(text.encode()) for text in TEXTS]
    assert cache.tokens == cache.bytes + len(TEXTS)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_do_not_change_a_byte(tmp_path, workers):
    """Data that depended on the machine's cores could not be reproduced (defect 2 of the peers)."""
    build_cache(TEXTS, Bytes(), tmp_path / "one", workers=1, shard_tokens=300)
    build_cache(TEXTS, Bytes(), tmp_path / "many", workers=workers, shard_tokens=300)
    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_workers_import_neither_jax_nor_the_callers_main_module(tmp_path):
    """A worker that imports jax takes seconds and gigabytes; one that runs the caller's script could do anything."""
    program = """
        import os, sys
        open(sys.argv[1], "a").write("main ran\\n")
        from dovetail_data import build_cache
        from probe import Probe
        build_cache(["a"] * 600, Probe(), sys.argv[2], workers=2)
    """
    probe = """
        import sys
        from data_toys import Bytes
        class Probe(Bytes):
            def encode_batch(self, texts):
                if "jax" in sys.modules or "grain" in sys.modules:
                    raise RuntimeError("imported jax")
                return super().encode_batch(texts)
    """
    (tmp_path / "main.py").write_text(textwrap.dedent(program))
    (tmp_path / "probe.py").write_text(textwrap.dedent(probe))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, tmp_path / "main.py", tmp_path / "ran", tmp_path / "cache"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").read_text() == "main ran\n"


def test_the_shard_size_does_not_change_the_fingerprint(tmp_path):
    """A loader's state must fit every cache of the same tokens."""
    prints = {build_cache(TEXTS, Bytes(), tmp_path / str(n), shard_tokens=n).fingerprint for n in (1, 100, 10**6)}
    assert len(prints) == 1
    assert build_cache(TEXTS[:-1], Bytes(), tmp_path / "other").fingerprint not in prints


def test_ids_above_16_bits_are_kept(tmp_path):
    """A uint16 would wrap them silently."""

    class Wide(Bytes):
        def encode_batch(self, texts):
            return [[70_000 + i for i in ids] for ids in super().encode_batch(texts)]

    for size, kind in ((2**16, "<u2"), (2**16 + 1, "<u4"), (70_300, "<u4")):
        tokenizer = (Wide if size == 70_300 else Bytes)(vocab_size=size, eos_ids=(size - 1,))
        cache = build_cache(["ab"], tokenizer, tmp_path / str(size))
        got = cache.gather(np.array([0]), np.array([0]), np.array([3]))
        assert got.dtype == kind
        assert got.tolist() == [*tokenizer.encode("ab"), size - 1]


def test_progress_reaches_the_totals(tmp_path):
    """A progress bar that ends at 93% looks like lost data."""
    seen = []
    build_cache(TEXTS, Bytes(), tmp_path, progress=seen.append)
    last = seen[-1]
    assert len(seen) == 15
    assert (last.documents, last.bytes) == (last.total_documents, last.total_bytes)
    assert last.tokens == last.bytes + 60


def test_the_same_build_again_does_nothing(tmp_path):
    """Tokenising is the slow part of starting a run."""
    build_cache(TEXTS, Bytes(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build_cache(from_documents(TEXTS), Bytes(fault="raises"), tmp_path, workers=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("texts", "tokenizer", "options", "message"),
    [
        (TEXTS[1:], Bytes(), {}, "corpus: "),
        (TEXTS, Bytes(fingerprint="other"), {}, "tokenizer: 'bytes' there, 'other' here"),
        (TEXTS, Bytes(), {"shard_tokens": 7}, "shard_tokens: 67108864 there, 7 here"),
    ],
)
def test_another_cache_is_never_replaced_silently(tmp_path, texts, tokenizer, options, message):
    """Hours of tokenising, or the data of a running job, would be gone."""
    build_cache(TEXTS, Bytes(), tmp_path)
    before = files(tmp_path)
    with pytest.raises(CacheError, match=message):
        build_cache(texts, tokenizer, tmp_path, **options)
    assert files(tmp_path) == before
    new = build_cache(texts, tokenizer, tmp_path, overwrite=True, **options)
    assert len(new) == len(texts)
    assert files(tmp_path) != before


def test_a_directory_with_other_files_is_refused(tmp_path):
    """A cache among someone's files could not be deleted safely."""
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(CacheError, match=r"thesis\.tex"):
            build_cache(TEXTS, Bytes(), tmp_path, overwrite=overwrite)
    assert files(tmp_path) == {"thesis.tex": b"precious"}


def test_a_file_where_the_directory_should_be_is_an_error(tmp_path):
    """mkdir's own error names the path."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(FileExistsError, match="cache"):
        build_cache(TEXTS, Bytes(), tmp_path / "cache")


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from data_toys import Bytes
from dovetail_data import build, build_cache
build._CHUNK_DOCUMENTS = 4
texts = [f"{i} é " * (i % 11) for i in range(60)]
show = lambda p: print(p.documents, flush=True)
build_cache(texts, Bytes(pause=0.02), sys.argv[2], workers=int(sys.argv[3]), shard_tokens=300, progress=show)
"""


def start_child(directory, workers):
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(directory), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("kill_at", "workers"), [(4, 1), (28, 1), (56, 1), (32, 2)])
def test_a_killed_build_continues_and_ends_the_same(tmp_path, kill_at, workers):
    """kill -9 at any moment: nothing half-built opens, finished shards are kept, the result is the same."""
    child = start_child(tmp_path / "killed", workers)
    while (line := child.stdout.readline()) and int(line) < kill_at:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    assert not (tmp_path / "killed" / "cache.json").exists()
    with pytest.raises(CacheError, match="is unfinished"):
        TokenCache.open(tmp_path / "killed")
    finished = len(list((tmp_path / "killed").glob("shard-?????.json")))
    assert bool(finished) == (kill_at > 20)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("shard-*.tokens")}
    seen = []
    build_cache(TEXTS, Bytes(), tmp_path / "killed", shard_tokens=300, progress=seen.append)
    assert files(tmp_path / "killed") == files(build_cache(TEXTS, Bytes(), tmp_path / "b", shard_tokens=300).directory)
    kept = [path for path, moment in times.items() if path.stat().st_mtime_ns == moment]
    assert len(kept) >= finished
    assert finished == 0 or seen[0].documents > 4


def test_a_damaged_finished_shard_is_made_again(tmp_path, monkeypatch):
    """What lies on the disk after a crash cannot be trusted because a ledger says so."""
    interrupt(tmp_path)
    path = tmp_path / "shard-00001.tokens"
    path.write_bytes(bytes(path.stat().st_size))
    build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)
    TokenCache.open(tmp_path, verify="full")
    (tmp_path / "b").mkdir()
    assert files(build_cache(TEXTS, Bytes(), tmp_path / "b", shard_tokens=300).directory).keys() >= {"cache.json"}
    assert (tmp_path / "cache.json").read_bytes() == (tmp_path / "b" / "cache.json").read_bytes()


def interrupt(directory, after=40, texts=TEXTS):
    def stop(progress):
        if progress.documents >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(texts, Bytes(), directory, shard_tokens=300, progress=stop)


@pytest.mark.parametrize("name", ["shard-00000.json", "building.json"])
def test_a_damaged_ledger_is_no_obstacle(tmp_path, name):
    """The build can always be done again; only the time is lost."""
    interrupt(tmp_path)
    (tmp_path / name).write_bytes(b"\0" * 10)
    build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)
    TokenCache.open(tmp_path, verify="full")


def test_an_unfinished_build_of_something_else_is_not_mixed_in(tmp_path):
    """Shards of two corpora in one cache would be silent corruption."""
    interrupt(tmp_path)
    with pytest.raises(CacheError, match="unfinished build of another cache"):
        build_cache(TEXTS[::-1], Bytes(), tmp_path, shard_tokens=300)
    cache = build_cache(TEXTS[::-1], Bytes(), tmp_path, shard_tokens=300, overwrite=True)
    assert cache.byte_lengths.tolist() == [len(text.encode()) for text in TEXTS[::-1]]


def test_a_damaged_cache_is_named_and_can_be_made_again(tmp_path):
    """Skipping the build because the manifest matches must not hide a missing shard."""
    cache = build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)
    (tmp_path / "shard-00001.tokens").unlink()
    with pytest.raises(CacheError, match=r"shard-00001\.tokens is missing"):
        build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)
    assert build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300, overwrite=True).fingerprint == cache.fingerprint


class Changing(Corpus):
    """Each reading finds the next version of document 50."""

    def __init__(self, *versions):
        self.versions = list(versions)

    def read(self):
        version = self.versions.pop(0)
        yield from (Document(str(i), f"{text}{version if i == 50 else ''}") for i, text in enumerate(TEXTS))


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path):
    """The cache would carry the fingerprint of a text that is not in it."""
    with pytest.raises(CorpusError, match="changed between"):
        build_cache(Changing(1, 2), Bytes(), tmp_path)
    assert files(tmp_path) == {}


def test_shards_of_a_changed_text_are_not_kept(tmp_path):
    """Changed during the build, killed, changed back: the ledger's fingerprint is right and the shard is not."""
    changing = Changing(1, 2, 1, 1)

    def stop(progress):
        if progress.documents >= 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(changing, Bytes(), tmp_path, shard_tokens=300, progress=stop)
    fresh = build_cache(changing, Bytes(), tmp_path, shard_tokens=300)
    right = [*TEXTS[:50], TEXTS[50] + "1", *TEXTS[51:]]
    assert fresh.fingerprint == build_cache(right, Bytes(), tmp_path / "b").fingerprint


def test_two_builds_in_one_directory_do_not_mix(tmp_path):
    """Two jobs that start at once would write over each other's shards."""
    inside, leave = threading.Event(), threading.Event()

    def wait(progress):
        inside.set()
        leave.wait(30)

    first = threading.Thread(target=build_cache, args=(TEXTS, Bytes(), tmp_path), kwargs={"progress": wait})
    first.start()
    assert inside.wait(30)
    with pytest.raises(CacheError, match="another process builds"):
        build_cache(TEXTS, Bytes(), tmp_path)
    leave.set()
    first.join(30)
    assert len(TokenCache.open(tmp_path)) == 60


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("range", CacheError, "id 257 in document '3'; expected 0 to 256"),
        ("short", CacheError, "3 lists for 4 texts"),
        ("raises", (KeyError, RuntimeError), "no such merge"),
    ],
)
def test_a_misbehaving_tokenizer_is_an_error_that_says_what_it_did(tmp_path, workers, fault, error, message):
    """Whatever it does must neither reach the cache nor hang the build."""
    with pytest.raises(error, match=message):
        build_cache([*"abcd", *TEXTS], Bytes(fault), tmp_path, workers=workers)
    with pytest.raises(CacheError):
        TokenCache.open(tmp_path)


def test_a_worker_that_dies_is_an_error_and_leaves_nothing_behind(tmp_path):
    """Short of memory, the kernel kills a worker; a build that waited for it would hang for ever."""
    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="ended with status -9"):
        build_cache(TEXTS, Bytes("dies"), tmp_path, workers=2)
    assert threading.active_count() == threads
    assert children() == []


def test_workers_end_when_the_caller_is_killed(tmp_path):
    """Orphans would keep memory and cores until someone notices."""
    child = start_child(tmp_path, 2)
    child.stdout.readline()
    workers = children(child.pid)
    assert len(workers) == 2
    child.kill()
    child.wait(30)
    child.stdout.close()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, workers
        time.sleep(0.05)


def children(pid=None):
    out = ps("-wwo", "pid=,args=", "--ppid", str(pid or os.getpid()))
    return [int(line.split()[0]) for line in out.splitlines() if "dovetail_data._worker" in line]


def alive(pid):
    state = ps("-o", "stat=", "-p", str(pid)).strip()
    return bool(state) and not state.startswith("Z")


def ps(*arguments):
    return subprocess.run(["ps", *arguments], check=False, capture_output=True, text=True).stdout


def test_what_a_tokenizer_prints_does_not_reach_the_results(tmp_path):
    """Results come over the worker's standard output."""
    cache = build_cache(TEXTS, Bytes("prints"), tmp_path / "a", workers=2)
    assert cache.fingerprint == build_cache(TEXTS, Bytes(), tmp_path / "b").fingerprint


def test_a_tokenizer_that_does_not_pickle_works_alone_and_is_refused_otherwise(tmp_path):
    """The message says how to go on."""
    with pytest.raises(TypeError, match=r"does not pickle .* workers=1"):
        build_cache(TEXTS, NoPickle(), tmp_path / "a", workers=2)
    assert len(build_cache(TEXTS, NoPickle(), tmp_path / "b", workers=1)) == 60


def test_a_corpus_without_documents_is_refused(tmp_path):
    """It has no plan."""
    with pytest.raises(CorpusError, match="no documents"):
        build_cache([], Bytes(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("tokenizer", "options", "message"),
    [
        (Bytes(eos_ids=()), {}, "eos_ids"),
        (Bytes(eos_ids=(257,)), {}, "eos_ids"),
        (Bytes(vocab_size=0), {}, "vocab_size=0"),
        (Bytes(), {"workers": 0}, "workers=0"),
        (Bytes(), {"workers": 5000}, "workers=5000"),
        (Bytes(), {"shard_tokens": 0}, "shard_tokens=0"),
    ],
)
def test_wrong_options_are_refused(tmp_path, tokenizer, options, message):
    """Each would fail later, or never end."""
    with pytest.raises(ValueError, match=message):
        build_cache(TEXTS, tokenizer, tmp_path, **options)


def test_a_full_disk_leaves_a_build_that_continues(tmp_path, monkeypatch):
    """The disk fills while a shard is written."""
    from dovetail_data import writer

    whole = writer.write_file

    def full(path, data):
        if path.name == "shard-00003.lengths":
            path.write_bytes(b"part")
            raise OSError(28, "No space left on device")
        return whole(path, data)

    monkeypatch.setattr(writer, "write_file", full)
    with pytest.raises(OSError, match="No space left"):
        build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)
    monkeypatch.undo()
    assert len(build_cache(TEXTS, Bytes(), tmp_path, shard_tokens=300)) == 60
    TokenCache.open(tmp_path, verify="full")
