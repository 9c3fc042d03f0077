"""docs/walk.py: the pages are what the script makes today, from today's weights; the page works in a browser, alone.

`python -m docs.walk` writes them again.
"""

import ast
import html
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_browser import BROWSER, ERRORS

from docs.walking.book import cells_of
from docs.walking.pages import markdown_block, slug
from docs.walking.write import kl_pages, pages
from nanorlhf.run import inputs

pytest.importorskip("triton", reason="the walk shows the fused kernel, in Triton's interpreter: Linux only")

ROOT = Path(__file__).parents[1]
DOCS, WALK = ROOT / "docs", ROOT / "docs" / "walk.py"
PAGES = ["walk.md", "walk.html", "walk.ipynb", "kl_estimators.md"]
DRAWINGS = ["walk_pipeline.svg", "walk_masks.svg", "walk_strip.svg", "walk_clip.svg", "walk_time.svg"]
LESSON = [f"nanorlhf/{name}.py" for name in (
    "data/tldr", "packing", "attention", "llama", "models", "losses", "pairs", "decoder", "rollout", "ppo", "optim",
)] + ["train_sft.py", "train_rm.py", "train_ppo.py"]  # fmt: skip
CONSTANTS = {
    "0.95",
    "0.01",
    "2506.09477",
}  # of the method, and an address: what prose may say with two decimals or more
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?%?")


@pytest.fixture(scope="module")
def walked():
    """The walk, run once."""
    return runpy.run_path(str(WALK))


@pytest.fixture(scope="module")
def made(walked):
    return pages(walked["book"], walked["names"][: walked["L"] + 2]) | kl_pages()


def visible(name: str, content: str) -> str:
    """The text of a page: of HTML without tags, style and script, of a notebook its sources and outputs."""
    if name.endswith(".html"):
        return html.unescape(re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", content, flags=re.DOTALL))
    if name.endswith(".ipynb"):
        return "\n".join(
            "".join(cell["source"]) + "".join(text for o in cell.get("outputs", []) for text in o["data"].values())
            for cell in json.loads(content)["cells"]
        )
    return content


def near(a: str, b: str) -> bool:
    """Whether two printed numbers are the same but for another processor's rounding: three significant digits."""
    if a == b:
        return True
    x, y = (float(text.rstrip("%")) for text in (a, b))
    if a.endswith("%"):
        return abs(x - y) <= 0.5  # one token of the batch
    if "." not in a + b and "e" not in a + b:
        return False
    unit = 0.0 if "e" in a + b else 10.0 ** -max(len(text.partition(".")[2]) for text in (a, b))
    return abs(x - y) <= max(2.01 * unit, 5e-3 * max(abs(x), abs(y)))


def differences(a: str, b: str) -> list[tuple[str, str]]:
    """Where two texts differ: in their words, or in numbers that are not `near`."""
    words = [NUMBER.sub("#", text).split() for text in (a, b)]
    found = [pair for pair in zip(*words, strict=False) if pair[0] != pair[1]]
    if len(words[0]) != len(words[1]):
        found.append((f"{len(words[0])} words", f"{len(words[1])} words"))
    numbers = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
    return found or [pair for pair in numbers if not near(*pair)]


@pytest.mark.parametrize("name", PAGES + DRAWINGS)
def test_a_page_is_what_the_script_makes(made, name):
    found = differences(visible(name, (DOCS / name).read_text(encoding="utf-8")), visible(name, made[name]))
    assert found == [], "run: python -m docs.walk"


def test_every_page_that_is_made_is_compared(made):
    assert set(made) == {*PAGES, *DRAWINGS}


def test_what_the_comparison_lets_pass():
    assert differences("p = 0.123, 7 of 9, 14.9%", "p = 0.124, 7 of 9, 15.2%") == []
    assert differences("1.2345e-05", "1.2346e-05") == []
    for other in (
        "p = 0.13, 7 of 9",
        "p = 0.123, 8 of 9",
        "q = 0.123, 7 of 9",
        "p = 0.123, 7 of 9 and",
        "p = -0.123, 7 of 9",
    ):
        assert differences("p = 0.123, 7 of 9", other), other
    assert differences("1.2345e-05", "1.3e-05")


@pytest.mark.parametrize(
    "stage, station",
    [("rm", 4), ("ppo", 5), *(pytest.param(stage, 3, marks=pytest.mark.nightly) for stage in ("base", "sft"))],
)
def test_a_changed_weight_changes_the_page(walked, monkeypatch, tmp_path, stage, station):
    """The first five stations with one tensor of one checkpoint a little larger."""
    shutil.copytree(inputs.EMBEDDED, tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / stage / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.2
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setattr(inputs, "EMBEDDED", tmp_path / "checkpoints")
    source = WALK.read_text(encoding="utf-8").split("# %% [markdown]\n# ## 6.")[0]
    changed = {"__name__": "walk"}
    exec(compile(source, str(WALK), "exec"), changed)

    def of_station(book) -> str:
        cells = [i for i, cell in enumerate(book.cells) if cell.source.startswith("## ")]
        return "".join(markdown_block(b) for i, b in book.blocks if cells[station - 1] <= i < cells[station])

    assert differences(of_station(walked["book"]), of_station(changed["book"]))


def test_the_notebook_runs_from_its_own_folder(walked):
    """Its cells, one after the other, as Jupyter runs them: with nothing set up and in docs/."""
    notebook = json.loads((DOCS / "walk.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = "import json, sys\nfor cell in json.load(sys.stdin):\n    exec(cell, globals())\nprint(len(book.blocks))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, input=json.dumps(cells), capture_output=True, text=True, cwd=DOCS, timeout=600, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) == len(walked["book"].blocks)


def test_prose_holds_no_computed_number():
    for script in (WALK, DOCS / "kl_estimators.py"):
        for cell in cells_of(script.read_text(encoding="utf-8")):
            if cell.kind == "markdown":
                said = set(re.findall(r"\d+\.\d\d+", cell.source))
                assert said <= CONSTANTS, f"{script.name}: {said - CONSTANTS} would stay when the weights change"


def test_every_station_ends_with_a_question_and_shows_the_code_that_runs(walked):
    book = walked["book"]
    stations = [i for i, cell in enumerate(book.cells) if re.match(r"## \d+\. ", cell.source)] + [len(book.cells)]
    assert len(stations) == 15
    for begin, end in zip(stations, stations[1:], strict=False):
        kinds = [type(block).__name__ for i, block in book.blocks if begin <= i < end]
        name = book.cells[begin].source.splitlines()[0]
        assert "Question" in kinds, name
        assert "Code" in kinds or name.startswith("## 14."), name  # the objective of station 11 again


def test_links_inside_the_pages_lead_to_headings():
    for page in PAGES[::3]:
        for target, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", (DOCS / page).read_text(encoding="utf-8")):
            text = (DOCS / (target or page)).read_text(encoding="utf-8")
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}, (page, anchor)


@pytest.mark.parametrize("file", LESSON)
def test_a_file_of_the_lesson_names_its_stations(file):
    """And station by station the page shows where it is: the numbers in the docstring are headings of the walk."""
    said = " ".join(ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))).split())
    named = re.search(r"docs/walk\.md[:,]? stations? ([\d, toand]+)", said)
    assert named, f'{file}: its docstring ends without "docs/walk.md, station ..."'
    numbers = set(re.findall(r"\d+", named[1]))
    assert numbers and numbers <= set(
        re.findall(r"^## (\d+)\. ", (DOCS / "walk.md").read_text(encoding="utf-8"), re.MULTILINE)
    )


# ------------------------------------------------------------------------------------------------------------ browser

# Appended to the page: it points at a token like a person, and writes down what it saw.
PROBE = """
window.addEventListener("load", () => {
  const inside = ".wide, pre, .ribbon, .left table";
  const wide = Array.from(document.querySelectorAll("main *, nav *")).filter((e) => !e.closest(inside)
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const found = { width: document.documentElement.clientWidth, scroll: document.documentElement.scrollWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 80)), errors: window.errors,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector(".fig text")).fill,
    requests: performance.getEntriesByType("resource").map((e) => e.name) };
  const lit = () => new Set(Array.from(document.querySelectorAll(".lit"), (e) => (e.closest("section") || e).id));
  const token = document.querySelector(".ribbon button:nth-child(3)");
  const say = (name) => token.dispatchEvent(new MouseEvent(name, { bubbles: true }));
  say("mouseover"); found.lit = [...lit()];
  found.same = [...document.querySelectorAll(".lit")].every((e) => e.dataset.t === "2");
  say("mouseout"); found.after = lit().size;
  token.click(); say("mouseout"); found.kept = lit().size;
  token.click(); found.gone = lit().size;
  document.documentElement.setAttribute("data-found", JSON.stringify(found));
});
"""


def browse(folder: Path, width: int, *flags: str) -> dict:
    """Load docs/walk.html with the probe in it -> what the probe saw, and what the browser logged."""
    page = (DOCS / "walk.html").read_text(encoding="utf-8")
    page = page.replace(
        "script-src '", "script-src 'unsafe-inline' 'nothing-", 1
    )  # of the test alone: admits the probe
    page = page.replace("<style>", f"<script>{ERRORS}</script><style>", 1)
    (folder / "walk.html").write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    frame = folder / "frame.html"  # a window is at least 500 wide without a frame of its own
    frame.write_text(
        f'<iframe id=f src="walk.html" style="width:{width}px;height:900px;border:0"></iframe><script>'
        'setTimeout(() => document.documentElement.setAttribute("data-found", document.getElementById("f")'
        ".contentDocument.documentElement.dataset.found), 1500)</script>",
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=4000", *flags]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, encoding="utf-8")
    found = re.search(r'<html data-found="(.*?)"', done.stdout)
    assert found, done.stdout[:500] + done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line and "nothing-" not in line]
    return json.loads(html.unescape(found[1])) | {"console": console}


in_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium"),
]


def marked(test):
    for mark in in_browser:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_asks_for_nothing_and_lights_a_token_at_every_station(tmp_path, width):
    seen = browse(tmp_path, width)
    assert 0 <= width - seen["width"] <= 20  # a scroll bar
    assert seen["scroll"] <= seen["width"] and seen["wide"] == []
    assert seen["errors"] == [] and seen["console"] == [] and seen["requests"] == []
    stations = {re.match(r"\d+", anchor)[0] for anchor in seen["lit"] if re.match(r"\d+", anchor)}
    assert {"2", "6", "7", "8", "9", "10", "11", "12", "13", "14"} <= stations and seen["same"]
    assert seen["after"] == 0 and seen["kept"] == len(seen["lit"]) and seen["gone"] == 0


@marked
def test_the_page_and_its_figures_are_dark_where_the_reader_s_system_is(tmp_path):
    light = browse(tmp_path, 800)
    dark = browse(tmp_path, 800, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    assert (light["background"], light["ink"]) == ("rgb(255, 255, 255)", "rgb(29, 33, 38)")
    assert (dark["background"], dark["ink"]) == ("rgb(20, 23, 26)", "rgb(227, 230, 234)")


def test_the_page_names_no_address_that_a_browser_would_fetch():
    page = (DOCS / "walk.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    for fetched in (
        r"<link\b",
        r"<img\b",
        r"<iframe\b",
        r"\bsrc\s*=",
        r"@import",
        r"url\(",
        r"\bfetch\(",
        r"XMLHttpRequest",
        r"import\(",
    ):
        assert not re.search(fetched, page), fetched
    for drawing in DRAWINGS:
        assert set(re.findall(r"https?://[^\"]+", (DOCS / drawing).read_text(encoding="utf-8"))) == {
            "http://www.w3.org/2000/svg"
        }
