"""The run report in a real browser: it shows what it holds, whatever a sample contains, and fetches nothing."""

import json
import shutil
import subprocess
import xml.sax.saxutils

import pytest

pytestmark = pytest.mark.browser
HOSTILE = "<script>document.title = 'owned'</script> <b>&amp;"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    from dovetail import report

    run = tmp_path_factory.mktemp("run")
    for name, key in (("metrics", "loss"), ("timings", "tokens_per_second")):
        rows = [{"step": step, key: 9.0 - step} for step in range(5)]
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = report.Report(
        title="A run",
        facts=[("parameters", "7 M")],
        results=[("bits per byte", "2.31")],
        samples=[("def f", "def f" + HOSTILE)],
        seconds={"pretraining": 1.0},
        next_steps=[("generate", "dovetail generate runs/quickstart/model")],
    )
    report.write(run / "report.html", content, run)
    return run / "report.html"


def chromium(page, *arguments):
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for found in map(shutil.which, names) if found), None)
    assert binary, "no Chromium is installed; nox -s browser skips where that is so"
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [binary, "--headless", "--no-sandbox", "--disable-gpu", *quiet, f"--user-data-dir={page.parent}/profile"]
    done = subprocess.run(
        [*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_the_report_shows_what_it_holds(page):
    """Breaks when a section is dropped or a sample is taken for markup."""
    dom = chromium(page, "--dump-dom")
    assert "<title>A run</title>" in dom
    for text in ("7 M", "2.31", "dovetail generate runs/quickstart/model", xml.sax.saxutils.escape(HOSTILE)):
        assert text in dom
    assert "<svg" in dom


def test_the_report_fetches_nothing(page):
    """Breaks when the page needs a network: it must open on a machine without one."""
    text = page.read_text()
    assert not [word for word in ('src="http', "@import", "url(http", "<link", "fetch(") if word in text]


def test_the_report_is_drawn(page):
    """Breaks when the page is blank, or wider than the window."""
    shot = page.parent / "shot.png"
    chromium(page, f"--screenshot={shot}", "--window-size=1000,1400")
    from matplotlib import image

    pixels = image.imread(shot)[..., :3]
    assert pixels.shape[:2] == (1400, 1000)
    assert 0.005 < (pixels.max(axis=2) < 0.6).mean() < 0.5
