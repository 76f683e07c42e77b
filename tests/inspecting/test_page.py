"""The page in a headless Chromium: clicked, pointed at, moved through by keys, and looked at by its colours."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btx_merge.inspecting.figures import ModelFigures, WorstToken
from btx_merge.inspecting.page import embedded, page_html
from btx_merge.inspecting.page_text import PageText
from btx_merge.inspecting.words import shown
from btx_merge.measuring.windows import Window
from tests.inspecting.test_figures import domain_of
from tests.support.browser import CHROMIUM, Browser

EXPERTS = ("seed", "code", "math")
HOSTILE = (
    "</script><img src=x onerror=document.title='taken'><b>bold</b>",
    "<!--<script>",
    "&lt;&amp;{{data}}{{script-hash}}",
    "\x1b]0;taken\x07\u202e\u2028\x00",
    "'\"`${alert(1)}\\",
)
in_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


class Words:
    """A tokenizer that decodes the id n to the n-th of some words."""

    def __init__(self, words: Sequence[str]):
        self.words = words

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(self.words[number] for number in ids)


def text_of(domain: str, words: Sequence[str], layers: int = 3, with_alone: bool = True) -> PageText:
    """Documents of a hundred tokens. In layer l, token t of a document has two experts, (t + l) % 3 first."""
    page = PageText(domain, len(words), layers, 3)
    tokenizer = Words([*words, "<s>"])
    for number, begin in enumerate(range(0, len(words), 100)):
        ids = range(begin, min(begin + 100, len(words)))
        window = Window((len(words), *ids), len(ids), number, 0, 1)
        page.expect(window, tokenizer)
        gates = np.zeros((len(ids), layers, 3), np.float32)
        for layer in range(layers):
            for position in range(1, len(ids)):  # the prefix is at 0; token t is routed at t + 1
                gates[position, layer, (position - 1 + layer) % 3] = 0.75
                gates[position, layer, (position + layer) % 3] = 0.25
        losses = np.linspace(1, 4, len(ids), dtype=np.float32)
        alone = losses[:, None] + np.array([-0.5, 0.5, 1.5], np.float32)
        page.fill(window, gates, losses, alone if with_alone else alone[:, :0])
    return page


def figures_of(*domains: str, experts: tuple[str, ...] = EXPERTS, layers: int = 3, **changes: Any) -> ModelFigures:
    share = [(1 / len(experts),) * len(experts)] * layers
    values = {
        "without": dict.fromkeys(experts, 2.5),
        "alone": {name: 1.5 + number for number, name in enumerate(experts)},
        "regret": 0.25,
        "worst": (WorstToken("be\nfore ", " ", " after", 3.0, experts[0], 1.5),) * 7,
        **changes,
    }
    return ModelFigures("merged", "top_k", experts, tuple(domain_of(name, share, **values) for name in domains))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open a page and wait until its text is there; in the end nobody has complained, and nothing was loaded."""
    browser.complaints.clear()
    browser.requests.clear()

    def opened(html: str, is_dark: bool = False) -> Browser:
        file = tmp_path / "report.html"
        file.write_text(html, encoding="utf-8")
        browser.dark(is_dark)
        browser.open(file)
        wait_for_text(browser)
        return browser

    yield opened
    assert browser.complaints == []
    assert {url.partition("?")[0] for url in browser.requests} == {(tmp_path / "report.html").as_uri()}


def wait_for_text(page: Browser) -> None:
    page.wait("document.getElementById('text')?.getAttribute('aria-busy') !== 'true'")


def two_domains(**changes: Any) -> str:
    words = [f" w{number}" for number in range(150)]
    texts = [text_of("code", words), text_of("math", [word.upper() for word in words[:20]])]
    return page_html(figures_of("code", "math", **changes), None, texts)


def classes(page: Browser, token: int) -> set[str]:
    return set(page.value(f"spans[{token}].className").split())


@in_chromium
def test_a_domain_is_chosen(open_page: Any) -> None:
    page = open_page(two_domains())
    assert page.value("document.title") == "Routing of merged"
    assert page.value("spans.map((span) => span.textContent).join('')").startswith(" w0 w1 w2")
    page.click("#domains label:nth-of-type(2) span")
    wait_for_text(page)
    assert page.value("spans.map((span) => span.textContent).join('')") == "".join(f" W{n}" for n in range(20))
    page.press("ArrowLeft")  # radio buttons: an arrow key chooses the other one
    wait_for_text(page)
    assert page.value("spans.length") == 150


@in_chromium
def test_the_slider_chooses_a_layer(open_page: Any) -> None:
    """Over three layers each expert has the same mean; so the first of them is the first choice."""
    page = open_page(two_domains())
    assert page.value("document.getElementById('layer-name').textContent") == "mean of all layers"
    assert [sorted(classes(page, token) & {"x0", "x1", "x2"}) for token in range(3)] == [["x0"], ["x0"], ["x0"]]
    page.value("document.getElementById('layer').focus()")
    for layer in range(3):
        page.press("ArrowRight")
        wait_for_text(page)
        assert page.value("document.getElementById('layer-name').textContent") == f"{layer} of 0 to 2"
        for token in range(6):
            assert f"x{(token + layer) % 3}" in classes(page, token)
    assert classes(page, 99) & {"x0", "x1", "x2"} == set()  # the last of its document
    assert "none" in classes(page, 99)
    page.press("Home")
    wait_for_text(page)
    assert page.value("document.getElementById('layer-name').textContent") == "mean of all layers"


@in_chromium
def test_one_expert_is_shown_alone(open_page: Any) -> None:
    page = open_page(two_domains())
    page.value("document.getElementById('layer').focus()")
    page.press("ArrowRight")
    page.click("#experts button:nth-of-type(2)")
    wait_for_text(page)
    assert ["off" in classes(page, token) for token in range(6)] == [True, False, True, True, False, True]
    assert page.value("[...document.querySelectorAll('#experts button')].map((b) => b.ariaPressed)") == [
        *("false", "true", "false"),
    ]
    page.click("#experts button:nth-of-type(2)")
    wait_for_text(page)
    assert not any("off" in classes(page, token) for token in range(6))


@in_chromium
def test_losses_and_regrets_are_colours_too(open_page: Any) -> None:
    page = open_page(two_domains())
    page.click("#modes label:nth-of-type(2) span")
    wait_for_text(page)
    assert [classes(page, token) >= {"heat", "s1"} for token in (0, 5)] == [True, True]
    assert classes(page, 98) >= {"heat", "s2"}  # a loss of 4 nats is half of the scale
    page.click("#modes label:nth-of-type(3) span")
    wait_for_text(page)
    assert classes(page, 0) >= {"heat", "s1"}
    assert page.value("document.getElementById('hint').textContent").startswith("The stronger a colour, the better")
    page.click("#experts button:nth-of-type(1)")
    wait_for_text(page)
    assert classes(page, 0) >= {"heat", "s1"}  # by the mean of the layers the first expert is always first
    page.click("#experts button:nth-of-type(2)")
    wait_for_text(page)
    assert "off" in classes(page, 0)


@in_chromium
def test_what_is_told_of_a_token(open_page: Any) -> None:
    page = open_page(two_domains())
    assert page.value("document.getElementById('about').hidden")
    page.value("document.getElementById('layer').focus()")
    page.press("ArrowRight")
    page.hover("[data-token='1']")
    page.wait("!document.getElementById('about').hidden")
    cells = (
        "[...document.querySelectorAll('#about tr')].map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    loss = 1 + 3 / 99
    assert page.value(cells) == [
        ["expert", "gate weight", "loss alone"],
        ["seed", "0.00", f"{loss - 0.5:.3f}"],
        ["code", "0.75", f"{loss + 0.5:.3f}"],
        ["math", "0.25", f"{loss + 1.5:.3f}"],
    ]
    told = page.value("document.getElementById('about').textContent")
    assert '" w1"' in told
    assert f"loss {loss:.3f} nats, regret 0.500 (best: seed)" in told
    strip = "[...document.querySelectorAll('#about .strip i')].map((cell) => cell.className)"
    assert page.value(strip) == ["x1 here", "x2", "x0"]
    bold = "[...document.querySelectorAll('#about td.best')].map((cell) => cell.textContent)"
    assert page.value(bold) == [f"{loss - 0.5:.3f}", "code", "0.75"]
    page.hover("h1")
    page.wait("document.getElementById('about').hidden")
    page.hover("[data-token='99']")
    page.wait("document.getElementById('about').textContent.includes('not routed')")


@in_chromium
def test_the_keyboard_is_enough(open_page: Any) -> None:
    page = open_page(two_domains())
    assert page.value("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1
    page.value("document.querySelector('#text [tabindex]').focus()")
    seen = "document.activeElement.dataset.token"
    for key, token in [("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 149), ("Home", 0)]:
        page.press(key)
        assert page.value(seen) == str(token), key
    assert not page.value("document.getElementById('about').hidden")
    assert page.value("document.activeElement.getAttribute('aria-describedby')") == "about"
    page.press("ArrowDown")
    below = int(page.value(seen))
    tops = "[0, %d].map((n) => placeOf(spans[n]).top)"
    first, second = page.value(tops % below)
    assert second > first
    page.press("ArrowUp")
    assert page.value(seen) == "0"
    page.press("Escape")
    assert page.value("document.getElementById('about').hidden")
    assert page.value("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1


@in_chromium
def test_twenty_thousand_tokens(open_page: Any) -> None:
    """All are there, in parts that are laid out when they come into view; what is in view gets its colour at once."""
    words = [f" w{number}" + "\n" * (number % 10 == 0) for number in range(20_000)]
    page = open_page(page_html(figures_of("code"), None, [text_of("code", words)]))
    assert page.value("spans.length") == 20_000
    assert page.value("document.querySelectorAll('.part').length") >= 200
    assert page.value("getComputedStyle(document.querySelector('.part')).contentVisibility") == "auto"
    page.value("document.getElementById('text').scrollTop = document.getElementById('text').scrollHeight / 2")
    in_view = (
        "(() => { const box = document.getElementById('text').getBoundingClientRect();"
        "for (let y = box.top + 100; y < box.bottom; y += 3) {"  # between lines there is none
        "const found = document.elementFromPoint(box.left + 40, y);"
        "if (found.dataset.token) return Number(found.dataset.token); } return -1; })()"
    )
    page.wait(f"{in_view} > 1000")
    token = page.value(in_view)
    moved = (
        "(() => { const slider = document.getElementById('layer'); slider.value = 2;"
        f"slider.dispatchEvent(new Event('input')); return spans[{token}].className; }})()"
    )
    expected = f"x{(token % 100 + 1) % 3}" if token % 100 < 99 else "none"
    assert expected in page.value(moved).split()
    wait_for_text(page)
    assert "x1" in classes(page, 0)
    assert "x1" in classes(page, 19_900)


@in_chromium
def test_hostile_text_stays_text(open_page: Any) -> None:
    names = ("seed", HOSTILE[0], HOSTILE[4])
    worst = tuple(WorstToken(shown(text), shown(text), shown(text), 3.0, names[1], 1.0) for text in HOSTILE)
    figures = figures_of("code", experts=names, worst=worst)
    against = ModelFigures(HOSTILE[1], "top_k", names, figures.domains)
    html = page_html(figures, against, [text_of("code", HOSTILE)])
    page = open_page(html)
    assert page.value("spans.map((span) => span.textContent)") == [shown(text) for text in HOSTILE]
    assert page.value("document.querySelectorAll('img, b, #text script').length") == 0
    assert page.value("document.scripts.length") == 2
    assert page.value("document.title") == "Routing of merged"
    assert page.value("document.querySelector('#experts button:nth-of-type(2)').textContent") == HOSTILE[0]
    assert HOSTILE[1] in page.value("document.getElementById('facts').textContent")
    page.hover("[data-token='0']")
    page.wait("!document.getElementById('about').hidden")


@in_chromium
def test_nothing_else_may_run_or_load(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(two_domains(), encoding="utf-8")
    browser.open(file)
    wait_for_text(browser)
    browser.value(
        "(() => { const script = document.createElement('script'); script.textContent = 'window.taken = 1';"
        "document.body.append(script); const image = new Image(); image.src = 'https://example.invalid/x.png';"
        "document.body.append(image); })()"
    )
    assert browser.value("window.taken === undefined")
    fetched = "fetch('https://example.invalid/').then(() => 'loaded', (error) => error.name)"
    assert browser.value(fetched) == "TypeError"
    assert [text for text in browser.complaints if "Content Security Policy" in text]
    assert set(browser.refused) == {url for url in browser.requests if "example.invalid" in url}


COLOURS = """
(() => {
  const solid = (text) => {
    const canvas = document.createElement('canvas'), context = canvas.getContext('2d', {willReadFrequently: true});
    context.fillStyle = text; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const card = solid(getComputedStyle(document.getElementById('text')).backgroundColor);
  const ink = solid(getComputedStyle(document.getElementById('text')).color), span = spans[0], found = [];
  for (const kind of ['x0', 'x1', 'x2', 'x3', 'x4', 'x5', 'x6', 'x7', 'heat']) {
    for (let strength = 1; strength <= 4; strength++) {
      span.className = `t ${kind} s${strength}`;
      const over = solid(getComputedStyle(span).backgroundColor), part = over[3] / 255;
      found.push([`${kind} s${strength}`, [0, 1, 2].map((c) => over[c] * part + card[c] * (1 - part))]);
    }
  }
  return [ink, found];
})()
"""


def luminance(color: Sequence[float]) -> float:
    """As WCAG 2 defines it."""
    linear = [
        value / 255 / 12.92 if value / 255 <= 0.04045 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in color
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@in_chromium
@pytest.mark.parametrize("is_dark", [False, True])
def test_the_text_can_be_read_on_every_colour(open_page: Any, is_dark: bool) -> None:
    """WCAG 2 AA, 4.5 to 1; and experts differ from each other and from text that none has."""
    page = open_page(two_domains(), is_dark)
    ink, found = page.value(COLOURS)
    assert (luminance(ink[:3]) > 0.5) is is_dark
    for name, color in found:
        light, dark = sorted((luminance(color), luminance(ink[:3])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name
    strongest = [tuple(color) for name, color in found if name.endswith("s4") and not name.startswith("heat")]
    assert len(set(strongest)) == len(strongest)


@in_chromium
def test_figures(open_page: Any) -> None:
    page = open_page(two_domains())
    assert page.value("document.querySelectorAll('#shares svg').length") == 4  # two quantities of two domains
    assert page.value("document.querySelectorAll('#shares svg rect').length") == 4 * 3 * 3
    assert page.value("document.querySelector('#shares svg rect title').textContent") == "layer 0, seed: 33.3 %"
    assert page.value("document.querySelectorAll('#depth polyline').length") == 4
    cells = (
        "[...document.querySelectorAll('#worth tr')].map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    assert page.value(cells)[:2] == [["", "as routed", *EXPERTS], ["code", "2.000", "+0.500", "+0.500", "+0.500"]]
    assert page.value(cells)[4] == ["code", "2.000", "1.500", "2.500", "3.500"]
    assert page.value("document.querySelectorAll('#regret li').length") == 14
    quote = page.value("document.querySelector('#regret .quote').textContent")
    assert quote == 'be\u23ce fore " " after'
    assert page.value("[...document.querySelectorAll('svg')].every((svg) => svg.getAttribute('aria-label'))")


@in_chromium
def test_two_models_stand_beside_each_other(open_page: Any) -> None:
    other = ModelFigures("before", "top_k", ("code", "bio"), figures_of("code", experts=("code", "bio")).domains)
    page = open_page(page_html(figures_of("code"), other, [text_of("code", ["a", "b"])]))
    titles = page.value("[...document.querySelectorAll('#shares h3')].map((title) => title.textContent)")
    assert titles == [
        *("Share of tokens, merged", "code", "Mean gate weight, merged", "code"),
        *("Share of tokens, before", "code", "Mean gate weight, before", "code"),
    ]
    legend = page.value("document.querySelector('#shares p:nth-of-type(2)').textContent")
    assert legend.split() == ["seed", "code", "math", "bio"]
    assert page.value("document.querySelectorAll('#depth polyline.other').length") == 2


@in_chromium
def test_figures_that_were_not_measured_are_left_out(open_page: Any) -> None:
    figures = figures_of("code", without={}, alone={}, regret=None, worst=())
    page = open_page(page_html(figures, None, [text_of("code", ["a", "b", "c"], with_alone=False)]))
    assert page.value("document.querySelectorAll('#worth, #regret').length") == 0
    assert page.value("document.querySelectorAll('#modes label').length") == 2
    page.hover("[data-token='0']")
    page.wait("document.getElementById('about').textContent.includes('loss 1.000 nats')")
    page = open_page(page_html(figures, None, [text_of("code", [])]))
    assert page.value("document.getElementById('reader') === null")


# Without a browser


def test_no_text_can_end_the_block_of_data() -> None:
    block = embedded({"texts": HOSTILE, HOSTILE[0]: "\u2029"})
    assert not set(block) & set("<>&\u2028\u2029")
    assert json.loads(block) == {"texts": list(HOSTILE), HOSTILE[0]: "\u2029"}


def test_the_page_is_one_file() -> None:
    html = two_domains()
    before, _, after = html.partition('<script type="application/json"')
    frame = before + after.partition("</script>")[2]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|<link|\ssrc=|\sstyle=|\son\w+=", frame)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', frame)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1]
    assert "{{" not in frame


def test_the_shown_text_is_bounded_and_the_unseen_part_has_no_route() -> None:
    page = PageText("code", 3, 1, 2)
    tokenizer = Words(["a", "b", "c", "d", "e", "f"])
    window = Window((5, 0, 1, 2, 3, 4), 5, 0, 0, 5)
    page.expect(window, tokenizer)
    page.expect(Window((4, 0, 1), 2, 0, 5, 2), tokenizer)
    gates = np.tile(np.array([[0.25, 0.75]], np.float32), (5, 1, 1))
    page.fill(window, gates, np.arange(5, dtype=np.float32), np.zeros((5, 2), np.float32))
    page.fill(Window((4, 0, 1), 2, 0, 5, 2), gates[:2], np.ones(2, np.float32), np.ones((2, 2), np.float32))
    plain = page.to_dict()
    assert plain["tokens"] == ["a", "b", "c"]
    assert plain["documents"] == [0]
    first = np.frombuffer(base64.b64decode(plain["first"]), "<u2").tolist()  # [N, mean and one layer]
    assert first == [1, 1, 1, 1, 65535, 65535]
    assert np.frombuffer(base64.b64decode(plain["losses"]), "<f4").tolist() == [0, 1, 2]
