"""The report: self-contained, escaped, complete."""

import json
import re

from dovetail.report import Report, write


def run_files(tmp_path):
    for name, key in (("metrics", "loss"), ("timings", "tokens_per_second")):
        rows = [{"step": s, key: 1.0 + s} for s in range(5)] + [{"step": 5, key: None}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "valid/bits_per_byte": 2.0}) + "\n")


def test_page_is_self_contained_and_escaped(tmp_path):
    """Breaks when a sample injects markup, or the page needs the network."""
    run_files(tmp_path)
    report = Report(
        title="A <run>",
        facts=[("corpus", "a & b")],
        results=[("validation", "2.0")],
        samples=[("<script>", "<script>alert(1)</script>")],
        seconds={"Export": 1.25},
        next_steps=[("look", "dovetail checkpoint ls x")],
    )
    write(tmp_path / "report.html", report, tmp_path, reference=("unigram", 4.5))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "A &lt;run&gt;" in page
    assert "a &amp; b" in page
    assert "1.2 s" in page
    assert "dovetail checkpoint ls x" in page
    assert page.count("<svg") == 1
    assert not re.search(r'(src|href)="(?!#)', page)


def test_same_run_gives_the_same_curves(tmp_path):
    """Breaks when dates or random identifiers make two reports of one run differ."""
    from dovetail.report import curves

    run_files(tmp_path)
    assert curves(tmp_path) == curves(tmp_path)
