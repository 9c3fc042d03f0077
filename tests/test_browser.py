"""The report in a real browser: nothing overflows, the console is silent, search and sort work, nothing is fetched.

Headless chromium; Debian's `chromium`, which .ci/run installs where it can. Elsewhere these tests skip and say so.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report import HOSTILE, results, sample, trace

from nanorlhf.evaluation.html_page import html_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium"),
]

# Appended to the page: it works the controls like a person, and writes down what it saw.
PROBE = """
window.addEventListener("load", () => {
  const wide = Array.from(document.querySelectorAll("body *")).filter((e) => !e.closest(".wide")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const found = { width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 80)), errors: window.errors, scripts: document.scripts.length,
    images: Array.from(document.images).every((image) => image.naturalWidth > 0),
    background: getComputedStyle(document.body).backgroundColor };
  const box = document.getElementById("search"), order = document.getElementById("order");
  const titles = () => Array.from(document.querySelectorAll("#samples article:not([hidden]) h3"), (e) => e.textContent);
  box.value = "ZEBRA"; box.dispatchEvent(new Event("input")); found.searched = titles();
  box.value = ""; box.dispatchEvent(new Event("input"));
  order.value = "score down"; order.dispatchEvent(new Event("change")); found.best = titles()[0];
  order.value = "score up"; order.dispatchEvent(new Event("change")); found.worst = titles()[0];
  order.value = "disagreement down"; order.dispatchEvent(new Event("change")); found.disputed = titles()[0];
  order.value = "copy down"; order.dispatchEvent(new Event("change")); found.copied = titles()[0];
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
"""
ERRORS = "window.errors = []; window.addEventListener('error', (e) => window.errors.push(String(e.message)), true);"


def report_page() -> str:
    long = "supercalifragilistic" * 12
    rows = [sample(HOSTILE), sample("plain"), sample("zebra crossing"), sample("دراجتي 🙂 " + long)]
    for i, row in enumerate(rows):
        row |= {"score/ppo": [0.5, 3.0, -2.0, 1.0][i], "disagreement": [0.0, -1.0, 0.3, 2.0][i]}
        row |= {"verdict/ppo_vs_sft": "loss", "ppo": ["nothing", "plain", "no", "else"][i]}
    pixel = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da63fcff1f0003030200efa2a75b"
        "0000000049454e44ae426082"
    )
    found = results()
    found["policies"] |= {f"another_policy_{i}": {"rougeL": 0.1, "length": 9.0} for i in range(9)}
    return html_page(found, rows, {"ppo_kl": pixel}, [trace("a token"), trace(HOSTILE)], about=long)


def visit(page: str, folder: Path, width: int, *flags: str) -> dict:
    """Load the page with the probe in it -> what the probe saw, and what the browser logged."""
    page = page.replace(
        "script-src '", "script-src 'unsafe-inline' 'nothing-", 1
    )  # of the test alone: admits the probe
    page = page.replace("<style>", f"<script>{ERRORS}</script><style>", 1)
    page = page.replace("</body>", f"<script>{PROBE}</script></body>")
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    # A window is at least 500 wide without a frame of its own; an iframe may be as narrow as a phone.
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id=f src="report.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'setTimeout(() => document.documentElement.setAttribute("data-found", document.getElementById("f")'
        ".contentDocument.documentElement.dataset.found), 1500)</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [*command, "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        timeout=90,
        encoding="utf-8",
    )
    found = re.search(r'<html data-found="(.*?)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    seen = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return seen | {"console": [line for line in done.stderr.splitlines() if ":CONSOLE" in line]}


@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_fits_on_a_phone_and_a_desktop_without_a_complaint(tmp_path, width):
    seen = visit(report_page(), tmp_path, width)
    assert 0 <= width - seen["width"] <= 20  # a scroll bar
    assert seen["scroll"] <= seen["width"] and seen["wide"] == []
    assert seen["errors"] == [] and seen["images"]
    assert [line for line in seen["console"] if "nothing-" not in line] == []  # but for the policy that the test broke
    assert seen["scripts"] == 3  # the page's and the two of the test: none out of a post


def test_samples_can_be_searched_and_sorted(tmp_path):
    seen = visit(report_page(), tmp_path, 800)
    assert seen["searched"] == ["zebra crossing"]
    assert (seen["best"], seen["worst"], seen["copied"]) == ("plain", "zebra crossing", "plain")
    assert seen["disputed"].startswith("دراجتي")


def test_the_script_runs_under_the_page_s_own_policy(tmp_path):
    """Without the probe: the counter of the search box is written by the script, which its hash has to admit."""
    path = tmp_path / "report.html"
    path.write_text(report_page(), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=90)
    assert ">4 of 4</span>" in done.stdout and ":CONSOLE" not in done.stderr


def test_the_links_at_the_top_lead_to_their_sections(tmp_path):
    page = report_page()
    links = re.findall(r'<a href="#(.*?)">(.*?)</a>', page.split("<nav>")[1].split("</nav>")[0])
    assert [name for _, name in links] == ["Summaries", "Win rates", "Reward model", "Training", "Samples"]
    assert all(f"<h2 id={id}>" in page for id, _ in links)


def test_the_page_is_dark_where_the_reader_s_system_is(tmp_path):
    light = visit(report_page(), tmp_path, 800)["background"]
    dark = visit(report_page(), tmp_path, 800, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")[
        "background"
    ]
    assert light == "rgb(255, 255, 255)" and dark == "rgb(20, 23, 26)"
