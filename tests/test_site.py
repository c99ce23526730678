"""The documentation as a reader sees it: each page and README in Chromium, wide and on a phone.

ADAFISHER_SCREENSHOTS names a folder for the pictures of all pages. Without Chromium the tests are
skipped; ADAFISHER_BROWSER=required makes that a failure, as in CI.

Playwright drives the browser that Debian has: it takes pictures of whole pages and sees each
request, which Selenium leaves to DevTools commands by hand. Its own Chromium is not fetched.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
WIDTHS = {"desktop": 1280, "phone": 390}
TALLEST = 16000  # of a picture; Chromium draws no more at once
SMALLEST_TEXT = 9  # CSS pixels, in pictures on a phone
COMMANDS = ("chromium", "chromium-browser", "google-chrome")
HOW_TO = "install Debian's chromium (apt-get install chromium) and the extra 'dev', which has playwright"
# Root has no sandbox; the rest keeps the browser from calling home.
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
FLAGS += " --disable-sync --disable-quic"

# What the browser tells of an open page. Faults are lines for people.
LOOK = """async (smallest) => {
  const faults = [], root = document.documentElement;
  const name = (element) => element.outerHTML.slice(0, 70).replace(/\\s+/g, " ");
  if (root.scrollWidth > innerWidth) faults.push(`the page is ${root.scrollWidth} px wide`);

  // A box that scrolls has to say so: the shadow of docs/site.css at the side where more is.
  const box = (element) => {
    for (let at = element.parentElement; at && at !== document.body; at = at.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(at).overflowX)) return at;
  };
  const signed = (element) => getComputedStyle(element).backgroundAttachment.includes("local");
  for (const element of document.querySelectorAll("article *")) {
    const { right, width } = element.getBoundingClientRect(), hidden = getComputedStyle(element).visibility;
    if (width && right > innerWidth + 1 && hidden !== "hidden" && !box(element))
      faults.push(`outside the window: ${name(element)}`);
    if (["auto", "scroll"].includes(getComputedStyle(element).overflowX)
        && element.scrollWidth > element.clientWidth + 1 && !signed(element))
      faults.push(`scrolls, and nothing shows it: ${name(element)}`);
  }
  for (const table of document.querySelectorAll("article table")) {
    const around = box(table);
    if (innerWidth > 1000 && around && around.scrollWidth > around.clientWidth + 1)
      faults.push(`a table's last columns are hidden: ${name(table.tHead ?? table)}`);
  }

  for (const image of document.images) {
    await image.decode().catch(() => {});
    if (!image.naturalWidth) faults.push(`not loaded: ${image.getAttribute("src")}`);
    else if (smallest && /\\.svg$/.test(image.currentSrc)) faults.push(...await texts(image));
  }
  async function texts(image) {
    const holder = document.createElement("div");
    holder.style.width = image.getBoundingClientRect().width + "px";
    holder.innerHTML = await (await fetch(image.currentSrc)).text();
    const drawing = holder.querySelector("svg");
    Object.assign(drawing.style, { width: "100%", height: "auto" });
    document.body.append(holder);
    const found = [...drawing.querySelectorAll("text")];
    const scale = ({ a, b }) => Math.hypot(a, b);  // text may be turned
    const size = (text) => parseFloat(getComputedStyle(text).fontSize) * scale(text.getScreenCTM());
    const small = found.filter((text) => size(text) < smallest)
      .map((text) => `${size(text).toFixed(1)} px: ${text.textContent}`);
    holder.remove();
    if (!found.length) return [`${image.src} has no text that is text`];
    return small.length ? [`${image.src} is hard to read: ${small.join("; ")}`] : [];
  }

  const ids = [...document.querySelectorAll("[id], a[name]")].map((element) => element.id || element.name);
  const links = [...document.querySelectorAll("a[href]")].map((link) => link.href);
  return { faults, ids, links, height: root.scrollHeight };
}"""


class Reader:
    """Opens the pages of a folder in a browser window of some width."""

    def __init__(self, browser: Any, folder: Path, address: str, width: int) -> None:
        self.folder, self.address, self.width = folder, address, width
        self.faults: list[str] = []
        self._ids: dict[str, set[str]] = {}
        self._links: list[tuple[str, str]] = []
        self._page = browser.new_page(viewport={"width": width, "height": 800})
        self._page.set_default_timeout(120_000)  # milliseconds: other tests have the cores too
        self._page.on("response", lambda response: self._answered(response.status, response.url))
        self._page.on("pageerror", lambda error: self.faults.append(f"{self._page.url}: {error}"))

    def read(self, path: str, pictures: Path) -> None:
        """Open a page, take its picture, and look at it."""
        self._page.goto(f"{self.address}/{path}")
        found = self._page.evaluate(LOOK, SMALLEST_TEXT if self.width == WIDTHS["phone"] else 0)
        self.faults += [f"{path} at {self.width}: {fault}" for fault in found["faults"]]
        self._ids[path] = set(found["ids"])
        self._links += [(path, link) for link in found["links"]]
        whole = {"x": 0, "y": 0, "width": self.width, "height": min(found["height"], TALLEST)}
        name = f"{path.replace('/', '-')}-{self.width}.jpg"
        self._page.screenshot(path=pictures / name, clip=whole, full_page=True, quality=80)

    def follow(self) -> None:
        """Look where all links within the folder lead, when all pages were read."""
        for page, link in dict.fromkeys(self._links):
            parts = urlsplit(link)
            if f"{parts.scheme}://{parts.netloc}" != self.address:
                continue
            target, anchor = unquote(parts.path).lstrip("/"), unquote(parts.fragment)
            if target.endswith("/"):
                target += "index.html"
            if not (self.folder / target).exists():
                self.faults.append(f"{page}: {link} leads nowhere")
            elif anchor and target in self._ids and anchor not in self._ids[target]:
                self.faults.append(f"{page}: {link} leads to no heading")

    def _answered(self, status: int, url: str) -> None:
        if status >= 400:
            self.faults.append(f"{self._page.url} asks for {url}: {status}")


def chromium() -> str:
    """The browser's path; without it, or what drives it, the test is skipped or fails."""
    command = next(filter(None, map(shutil.which, COMMANDS)), None)
    if command and importlib.util.find_spec("playwright"):
        return command
    told = f"no browser, so nobody has looked at the pages: {HOW_TO}"
    return pytest.fail(told) if os.environ.get("ADAFISHER_BROWSER") == "required" else pytest.skip(told)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    command = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=command, args=FLAGS.split())
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The site's folder, with the repository and README as a page in it; and its address."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "repository").mkdir()
    for path in site.iterdir():
        (folder / path.name).symlink_to(path)
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (folder / "repository" / path.name).symlink_to(path)
    (folder / "repository" / "README.html").write_text(readme(), encoding="utf-8")
    with serving(folder) as address:
        yield folder, address


def readme() -> str:
    """README.md by the site's Markdown; pictures and tables are held as GitHub holds them."""
    from markdown import Markdown

    body = Markdown(extensions=["tables", "pymdownx.superfences", "toc"]).convert((ROOT / "README.md").read_text())
    # The ticks' and links' own look is no matter here.
    style = "body { font: 16px sans-serif; margin: 16px; max-width: 830px } img { max-width: 100% }"
    style += " table, pre { display: block; overflow-x: auto; background: local }"
    head = f"<meta charset='utf-8'><link rel='icon' href='data:,'><style>{style}</style>"
    return f"<!doctype html>{head}<article>{body}</article>"


class serving:
    """The folder's files at an address of this machine."""

    def __init__(self, folder: Path) -> None:
        class Quiet(SimpleHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("ADAFISHER_SCREENSHOTS", tmp_path)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.ci
@pytest.mark.parametrize("width", WIDTHS.values(), ids=list(WIDTHS))
def test_each_page_can_be_read(browser: Any, site: Path, served: tuple[Path, str], pictures: Path, width: int) -> None:
    reader = Reader(browser, *served, width)
    pages = [path.relative_to(site).as_posix() for path in site.rglob("*.html")] + ["repository/README.html"]
    assert len(pages) > 30
    for page in pages:
        reader.read(page, pictures)
    reader.follow()
    assert not reader.faults, "\n".join(reader.faults)
    assert len(list(pictures.glob(f"*-{width}.jpg"))) == len(pages)


SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 100"><text y="50" font-size="{}">a</text></svg>'
WIDE = "<div style='overflow-x: {}; width: 200px'><table><tr><td><p style='width: 1500px'>a</table></div>"


@pytest.mark.parametrize(
    ("body", "width", "fault"),
    [
        ("<p>all is well <a href='#here'>here</a> <a href='other.svg' id=here>there</a><img src=large.svg>", 390, ""),
        ("<p style='width: 500px'>too wide", 390, "the page is 5"),
        ("<div style='overflow: hidden'><p style='width: 500px'>cut off</div>", 390, "outside the window: <p"),
        (WIDE.format("auto"), 390, "scrolls, and nothing shows it: <div"),
        (WIDE.format("auto; background: local"), 1280, "a table's last columns are hidden"),
        (WIDE.format("auto; background: local"), 390, ""),
        ("<img src=missing.png>", 1280, "not loaded: missing.png"),
        ("<img src=missing.png>", 1280, "asks for"),
        ("<img src=small.svg width=358>", 390, "is hard to read: 8.1 px: a"),
        ("<img src=small.svg width=358>", 1280, ""),
        ("<img src=other.svg>", 390, "has no text that is text"),
        ("<a href=nowhere.html>a</a>", 390, "nowhere.html leads nowhere"),
        ("<a href='#nowhere'>a</a>", 390, "#nowhere leads to no heading"),
        ("<script>no.such.thing</script>", 390, "no is not defined"),
    ],
)
def test_each_check_finds_its_fault(body: str, width: int, fault: str, browser: Any, tmp_path: Path) -> None:
    head = "<!doctype html><link rel=icon href='data:,'><meta charset=utf-8><style>html { overflow-x: hidden }</style>"
    (tmp_path / "page.html").write_text(f"{head}<article>{body}</article>")
    (tmp_path / "small.svg").write_text(SVG.format(9))
    (tmp_path / "large.svg").write_text(SVG.format(12))
    (tmp_path / "other.svg").write_text(SVG.replace("text", "path"))
    with serving(tmp_path) as address:
        reader = Reader(browser, tmp_path, address, width)
        reader.read("page.html", tmp_path)
        reader.follow()
    assert [told for told in reader.faults if fault in told] if fault else reader.faults == [], reader.faults


def test_a_browser_that_is_required_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda command: None)
    monkeypatch.delenv("ADAFISHER_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        chromium()
    monkeypatch.setenv("ADAFISHER_BROWSER", "required")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium()
