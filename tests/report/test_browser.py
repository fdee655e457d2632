"""The report in a real browser: Chromium without a screen, driven by selenium. Skipped where they are not installed."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codeact.report.page import write_report
from tests.helpers.run_folder import make_run

pytest.importorskip("selenium", reason="no selenium: pip install selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium with its driver: apt-get install chromium chromium-driver"
)

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --force-color-profile=srgb"
).split()

# All texts of a plot, and where they are.
TEXTS = """
return [...document.querySelectorAll('svg.plot')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => {
    const b = t.getBoundingClientRect();
    return {text: t.textContent, left: b.left, right: b.right, top: b.top, bottom: b.bottom,
            size: parseFloat(getComputedStyle(t).fontSize) * frame.width / svg.viewBox.baseVal.width};
  });
  return {name: svg.closest('figure').id, left: frame.left, right: frame.right, top: frame.top, bottom: frame.bottom,
          texts};
});
"""

# Contrast of every text with what is behind it, by the formula of WCAG 2; the lowest ones first.
CONTRAST = """
const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = colour => {
  probe.clearRect(0, 0, 1, 1); probe.fillStyle = colour; probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
};
const luminance = colour => {
  const [r, g, b] = [...rgba(colour)].slice(0, 3).map(v => {
    v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ratio = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)]; return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05);
};
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (rgba(colour)[3] > 250) return colour;
  }
  return 'white';
};
const found = [];
for (const e of document.querySelectorAll('body *:not(svg, svg *)')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (own && e.checkVisibility()) found.push([ratio(getComputedStyle(e).color, behind(e)), e.textContent.slice(0, 40)]);
}
for (const t of document.querySelectorAll('svg text')) {
  t.scrollIntoView({block: 'center'});
  const b = t.getBoundingClientRect();
  const shape = document.elementsFromPoint((b.left + b.right) / 2, (b.top + b.bottom) / 2)
    .find(e => e instanceof SVGGeometryElement && getComputedStyle(e).fill !== 'none');
  const halo = t.closest('.halo');
  const ground = shape && !halo ? getComputedStyle(shape).fill : behind(t.closest('figure'));
  found.push([ratio(getComputedStyle(t).fill, ground), t.textContent]);
}
const root = getComputedStyle(document.documentElement);
const marks = {};
for (const name of ['chosen', 'other', 'accent', ...[0, 1, 2, 3, 4, 5, 6, 7, 8].map(n => 'c' + n)])
  marks[name] = ratio(root.getPropertyValue('--' + name).trim(), root.getPropertyValue('--paper').trim());
return {texts: found.sort((a, b) => a[0] - b[0]).slice(0, 5), count: found.length, marks,
        paper: luminance(root.getPropertyValue('--paper').trim())};
"""


class Browser:
    """Chromium with the page open."""

    def __init__(self, driver: Any, page: Path) -> None:
        self.driver = driver
        self.page = page

    def open(self, width: int, scheme: str = "light", media: str = "") -> None:
        """Load the page anew."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        self.driver.get(self.page.as_uri())

    def run(self, script: str) -> Any:
        """Run JavaScript in the page, from outside of its policy."""
        return self.driver.execute_script(script)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    page = write_report(make_run(tmp_path_factory.mktemp("runs") / "run", rows=400, clusters=11))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Browser(driver, page)
    driver.quit()


def test_nothing_is_complained_of_run_or_loaded(browser: Browser) -> None:
    browser.driver.get_log("performance")  # of the start of the browser
    browser.open(1280)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    events = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    # Not those of the browser's own first page, which may still be loading.
    requested = [r["request"]["url"] for r in requests if r["documentURL"] == browser.page.as_uri()]
    assert requested[0] == browser.page.as_uri()
    assert [url for url in requested[1:] if url != "data:,"] == []
    assert browser.driver.get_log("browser") == []
    assert browser.driver.title == "codeact run run"
    assert browser.run("return document.images.length + document.forms.length") == 0
    assert browser.run("return [...document.scripts].filter(e => e.type != 'application/json').length") == 1
    # Closing tags in a row closed nothing: everything is where the template puts it.
    assert (
        browser.run("return [...document.body.children].map(e => e.localName).join(' ')")
        == "a header main footer script"
    )
    assert browser.run("return [...document.querySelectorAll('main > *')].every(e => e.localName == 'section')")


def test_the_policy_stops_what_would_load_or_run(browser: Browser) -> None:
    """The check of the check: what the test above looks for does show where it happens."""
    browser.open(1280)
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<img src="http://127.0.0.1:9/x.png" onerror="document.title = 1"><p onclick="document.title = 2">x</p>\');'
        "document.body.lastChild.click();"
        "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 3'}));"
    )
    log = " ".join(entry["message"] for entry in browser.driver.get_log("browser"))
    assert "Content Security Policy" in log
    assert browser.driver.title == "codeact run run"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_it_fits_the_screen(browser: Browser, width: int) -> None:
    browser.open(width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("const e = document.documentElement; return [e.scrollWidth, e.clientWidth]") == [width, width]
    plots = browser.run(TEXTS)
    assert len(plots) == 8
    for plot in plots:
        assert plot["right"] - plot["left"] > 300, plot["name"]
        assert plot["bottom"] - plot["top"] > 70, plot["name"]
        assert plot["left"] >= 0, plot["name"]
        assert plot["right"] <= width, plot["name"]
        texts = plot["texts"]
        assert len(texts) > 5, plot["name"]
        for text in texts:
            assert text["size"] >= 8.9, (plot["name"], text)  # CSS pixels
            assert text["left"] >= plot["left"] - 1, (plot["name"], text)
            assert text["right"] <= plot["right"] + 1, (plot["name"], text)
            assert text["top"] >= plot["top"] - 1, (plot["name"], text)
            assert text["bottom"] <= plot["bottom"] + 1, (plot["name"], text)
        for number, one in enumerate(texts):
            for other in texts[number + 1 :]:
                wide = min(one["right"], other["right"]) - max(one["left"], other["left"])
                high = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
                assert wide < 1 or high < 3, (plot["name"], one, other)  # boxes hold the font's empty ascent


@pytest.mark.parametrize("width", [390, 520, 1280])
def test_what_was_lost_is_seen_without_scrolling(browser: Browser, width: int) -> None:
    """On a phone the ledger's rows are cards; what a stage lost stands within the screen on all of them."""
    browser.open(width)
    cells = browser.run(
        "return [...document.querySelectorAll('#ledger td')].filter(e => e.textContent.includes('empty answer: ') ||"
        " e.textContent.includes('below budget: ')).map(e => { const box = e.getBoundingClientRect();"
        " return {left: box.left, right: box.right, head: getComputedStyle(e, '::before').content}; })"
    )
    assert len(cells) == 2
    for cell in cells:
        assert 0 <= cell["left"] < cell["right"] <= width
        assert ("lost" in cell["head"]) == (width < 544)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_list_is_searched_and_sorted(browser: Browser, width: int) -> None:
    browser.open(width)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    shown = (
        "return [...document.querySelectorAll('#ledger table.list tbody tr')].filter(e => e.checkVisibility())"
        ".map(e => [...e.cells].map(c => c.textContent.trim()))"
    )
    everything = browser.run(shown)
    assert len(everything) == 300  # 150 of 160 chosen, 150 of 240 others
    browser.run("document.querySelector('#ledger th button').scrollIntoView({block: 'center'})")
    search = browser.driver.find_element("css selector", "#ledger .tools input")
    search.send_keys("CHOSEN socket")
    found = browser.run(shown)
    assert found == [row for row in everything if row[1] == "chosen" and "socket" in row[5].lower()]
    assert 10 < len(found) < 150
    assert browser.run("return document.querySelector('#ledger output').value") == f"{len(found)} of 300"
    search.clear()
    search.send_keys(" ")
    assert browser.run(shown) == everything
    heads = browser.driver.find_elements("css selector", "#ledger table.list thead button")
    assert [head.text for head in heads] == ["row", "fate", "cluster", "IFD", "tokens", "question"]
    heads[3].click()
    ifds = [row[3] for row in browser.run(shown)]
    known = [float(ifd) for ifd in ifds if ifd != "\N{EN DASH}"]
    assert known == sorted(known)
    assert len({"\N{EN DASH}"} & set(ifds)) == 1
    assert set(ifds[len(known) :]) == {"\N{EN DASH}"}  # what has no number is last, either way
    heads[3].click()
    assert [row[3] for row in browser.run(shown)] == [f"{ifd:.3f}" for ifd in known[::-1]] + ifds[len(known) :]
    heads[4].click()
    tokens = [int(row[4].replace(",", "")) for row in browser.run(shown)]
    assert tokens == sorted(tokens)
    assert max(tokens) >= 1000  # so a number with a comma is one
    sorted_by = "return [...document.querySelectorAll('#ledger [aria-sort]')].map(e => e.textContent + e.ariaSort)"
    assert browser.run(sorted_by) == ["tokensascending"]


@pytest.mark.parametrize("width", [390, 1280])
def test_a_plot_tells_what_is_under_the_pointer(browser: Browser, width: int) -> None:
    """At every tenth point of every plot; far from all points nothing is told."""
    browser.open(width)
    told = browser.run("""
        return [...document.querySelectorAll('figure > script')].map(data => {
          const figure = data.parentElement, svg = figure.querySelector('svg'), tip = figure.querySelector('.tip');
          const {points} = JSON.parse(data.textContent), frame = svg.getBoundingClientRect();
          const scale = frame.width / svg.viewBox.baseVal.width;
          const move = (x, y) => svg.dispatchEvent(new PointerEvent('pointermove',
            {clientX: frame.left + x * scale, clientY: frame.top + y * scale}));
          const right = points.filter((point, n) => n % 10 == 0).map(([x, y, text]) => {
            move(x, y);
            const box = tip.getBoundingClientRect(), near = points.filter(p => p[0] == x);
            const inside = x >= 0 && y >= 0 && x * scale <= frame.width && y * scale <= frame.height;
            return inside && near.some(p => p[2] == tip.textContent) && box.left >= 0 && box.right <= innerWidth;
          });
          move(-500, -500);
          const marks = [...svg.querySelectorAll('use')].map(e => [e.x.baseVal.value, e.y.baseVal.value]);
          const off = points.map(([x, y]) => Math.min(...marks.map(([a, b]) => Math.hypot(a - x, b - y))));
          return {name: figure.id, off: Math.max(...off), count: right.length, right: right.every(one => one),
                  hidden: tip.hidden, bold: tip.querySelectorAll('*').length,
                  texts: points.map(point => point[2]).join('\\n')};
        });
    """)
    assert [plot["name"].removeprefix("figure-") for plot in told] == "ifd losses map lengths loss".split()
    assert all(plot["right"] and plot["hidden"] and plot["count"] and not plot["bold"] for plot in told), told
    assert all(plot["off"] < 0.2 for plot in told if plot["name"] in ("figure-losses", "figure-map", "figure-loss"))
    texts = {plot["name"].removeprefix("figure-"): plot["texts"] for plot in told}
    assert re.search(r"^row 1, cluster \d+: Sort a list. </style></pre>", texts["map"], re.MULTILINE)
    assert "step 10: held-out loss 1.5000" in texts["loss"]


def test_the_page_reads_without_its_script(browser: Browser) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(390)
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("return document.querySelectorAll('.tools, .tip, thead button').length") == 0
    assert browser.run("return document.querySelectorAll('table.list tbody tr').length") == 300 + 11 + 8
    assert browser.run("return [...document.querySelectorAll('table.list tr')].every(e => !e.hidden)")
    assert browser.run("return document.documentElement.scrollWidth") == 390
    seen = browser.run("return document.body.innerText")
    assert "Not chosen: below budget" in seen
    assert "step 10: held-out" not in seen  # the data of the plots is no text of the page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, scheme: str) -> None:
    browser.open(1280, scheme)
    found = browser.run(CONTRAST)
    assert (found["paper"] > 0.5) == (scheme == "light")
    assert found["count"] > 150
    assert found["texts"][0][0] >= 4.5, found["texts"]
    assert min(found["marks"].values()) >= 3, found["marks"]


def test_paper(browser: Browser) -> None:
    browser.open(700, "dark", "print")
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return document.documentElement.scrollWidth") <= 700
    folded = browser.run(
        "return [...document.querySelectorAll('details:not(:has(.list)) > :last-child')].map(e => e.offsetHeight)"
    )
    assert min(folded) > 20  # what is folded on a screen is on paper
    seen = "return [...document.querySelectorAll('details table.list')].some(e => e.checkVisibility())"
    assert browser.run(seen) is False  # but for lists of hundreds of rows
    assert len(folded) > 5
    made = browser.driver.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": False})
    pages = len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(made["data"])))
    assert 5 <= pages <= 40
