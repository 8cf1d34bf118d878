"""The page in a real browser: it renders, loads nothing, runs nothing, and nothing overlaps or is cut off.

Each check that something is absent has a counter-check: a bad page in which the same check finds it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import msgspec
import pytest
from conftest import often
from sample_records import HOSTILE, baseline_report, findings, measurement, run, tune_report

from upshift.report import html

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on PATH"),
]


def chromium(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    profile = page.parent / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    return subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
            *options, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True, errors="replace",
    )  # fmt: skip


def dump(page: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM after loading, and what was written to the console."""
    done = chromium(page, "--dump-dom", *options)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def requests(page: Path) -> list[str]:
    """URLs that the page itself asked for over a network, from the browser's network log."""
    log = page.parent / "net.json"
    chromium(page, "--dump-dom", f"--log-net-log={log}")
    text = log.read_text(errors="replace").rstrip().rstrip(",")
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = json.loads(text + "]}")
    found = []
    for event in content["events"]:
        params = event.get("params") or {}
        url, initiator = str(params.get("url", "")), str(params.get("initiator", ""))
        # The browser's own look-ups carry no page as their initiator.
        if re.match(r"(https?|wss?|ftp):", url) and initiator not in ("", "not an origin"):
            found.append(url)
    return found


def write(folder: Path, source: str) -> Path:
    path = folder / "page.html"
    path.write_text(source, encoding="utf-8")
    return path


def hostile_report() -> str:
    name = "<script>document.title='owned'</script><img src=http://example.invalid/a onerror=document.title='owned'>"
    report = tune_report(name)
    trials = tuple(msgspec.structs.replace(trial, name=name, failure=name) for trial in report.trials)
    return html.render_tune(msgspec.structs.replace(report, trials=trials, verdict=name), (run(name),), label=name)


PAGES = {
    "tune": lambda: html.render_tune(tune_report(), (run(),)),
    "baseline": lambda: html.render_tune(baseline_report()),
    "diagnosis": lambda: html.render_diagnosis(measurement(), findings(), "verdict"),
    "run": lambda: html.render_run(run()),
    "hostile": hostile_report,
}

BAD = "<!doctype html><title>x</title>{}<script>document.title='owned'</script><img src='http://example.invalid/a.png'>"


@pytest.mark.parametrize("kind", PAGES)
def test_renders_without_a_word_on_the_console(kind: str, tmp_path: Path) -> None:
    dom, console = dump(write(tmp_path, PAGES[kind]()))
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None and title[1].startswith("upshift ")
    assert dom.count("<svg") >= 2 and "</footer>" in dom


def test_the_console_check_can_find_something(tmp_path: Path) -> None:
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    _, console = dump(write(tmp_path, BAD.format(policy)))
    assert console


@pytest.mark.parametrize("kind", ["tune", "hostile"])
def test_nothing_is_requested(kind: str, tmp_path: Path) -> None:
    assert requests(write(tmp_path, PAGES[kind]())) == []


def test_the_request_check_can_find_something(tmp_path: Path) -> None:
    assert "http://example.invalid/a.png" in requests(write(tmp_path, BAD.format("")))


def test_a_script_in_a_name_does_not_run(tmp_path: Path) -> None:
    dom, _ = dump(write(tmp_path, hostile_report()))
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None and title[1] != "owned" and "&lt;script" in title[1]
    bad, _ = dump(write(tmp_path, BAD.format("")))
    assert "<title>owned</title>" in bad


#: Written around the page under test: measures it in a frame of a given width.
PROBE = """<!doctype html><title>?</title>
<iframe id=f src=inner.html width={width} height=800 style="border:0"></iframe>
<script>
f.onload = () => {{
  const d = f.contentDocument, found = [];
  if (d.documentElement.scrollWidth > {width}) found.push('page is ' + d.documentElement.scrollWidth + ' wide');
  for (const s of d.querySelectorAll('details')) s.open = true;
  for (const svg of d.querySelectorAll('svg.chart')) {{
    if (!svg.getBoundingClientRect().width) continue;
    const frame = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll('text')];
    const boxes = texts.filter(t => !t.hasAttribute('transform')).map(t => [t.textContent, t.getBoundingClientRect()]);
    for (const [i, [name, a]] of boxes.entries()) {{
      if (a.left < frame.left - 3 || a.right > Math.max(frame.right + 14, 0) || a.top < frame.top - 3
          || a.bottom > frame.bottom + 3) found.push('cut: ' + name);
      for (const [other, b] of boxes.slice(i + 1))
        if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4)
          found.push('overlap: ' + name + ' | ' + other);
    }}
  }}
  for (const t of d.querySelectorAll('td, dd, h1, h2, h3, p, .big'))
    if (t.scrollWidth > t.clientWidth + 2 && t.clientWidth) found.push('overflow: ' + t.textContent.slice(0, 60));
  document.title = JSON.stringify(found);
}};
</script>"""


def layout(folder: Path, source: str, width: int) -> list[str]:
    (folder / "inner.html").write_text(source, encoding="utf-8")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width))
    done = chromium(
        probe, "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,900", "--virtual-time-budget=3000"
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title is not None and title[1].startswith("["), done.stderr[-500:]
    found: list[str] = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


@pytest.mark.parametrize("width", often([360, 900, 1200], 360))
@pytest.mark.parametrize("kind", ["tune", "baseline", "diagnosis", "run"])
def test_nothing_overlaps_or_is_cut(kind: str, width: int, tmp_path: Path) -> None:
    assert layout(tmp_path, PAGES[kind](), width) == []


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", often(["x" * 600, HOSTILE[5] * 20], "x" * 600))
def test_long_names_break(name: str, width: int, tmp_path: Path) -> None:
    report = tune_report(name)
    trials = tuple(msgspec.structs.replace(t, name=name, reason=name, failure=name) for t in report.trials)
    report = msgspec.structs.replace(report, trials=trials, kept=(name,), verdict=name, plan_file=name)
    assert layout(tmp_path, html.render_tune(report, (run(name),)), width) == []


@pytest.mark.parametrize(
    ("rule", "finding"),
    [("body { white-space: nowrap; min-width: 2000px }", "wide"), (".t { font-size: 40px !important }", "overlap: ")],
)
def test_the_layout_check_can_find_something(rule: str, finding: str, tmp_path: Path) -> None:
    source = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html.render_tune(tune_report()))
    found = layout(tmp_path, source.replace("</style>", f"{rule}</style>"), 360)
    assert any(finding in item for item in found)


def first_pixel(png: bytes) -> tuple[int, ...]:
    """Colour of the top left corner, which no PNG filter changes."""
    assert png.startswith(b"\x89PNG") and png[24] == 8
    data, at = b"", 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        data += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + size
    return tuple(zlib.decompress(data)[1:4])


@pytest.mark.parametrize(("scheme", "colour"), [(0, (0x12, 0x14, 0x18)), (1, (0xF6, 0xF5, 0xF1))])
def test_both_themes_are_painted(scheme: int, colour: tuple[int, ...], tmp_path: Path) -> None:
    """Scheme 0 is dark, 1 is light."""
    shot = tmp_path / "shot.png"
    options = (f"--blink-settings=preferredColorScheme={scheme}", "--window-size=1200,900", f"--screenshot={shot}")
    chromium(write(tmp_path, PAGES["tune"]()), *options)
    assert first_pixel(shot.read_bytes()) == colour
