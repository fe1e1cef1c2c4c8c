"""Every notebook and the README, as GitHub shows them: on a desk and on a phone, on white and on black.

GitHub cannot be reached from a test, so its pipeline is followed as closely as can be had offline: nbconvert's plain
HTML without scripts, styles and widgets; GitHub's Markdown with mathematics; wide code, tables, outputs and displayed
formulas scroll in a box of their own. What GitHub's MathJax would set is set as MathML.
"""

import base64
import html
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import latex2mathml.converter
import matplotlib.pyplot as plt
import nbformat
import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from nbconvert import HTMLExporter
from PIL import Image
from playwright.sync_api import Browser

import notebook_utils as nb
from scripts import draw_concepts
from tests.browser.conftest import BUILD, ROOT, name_of
from tests.browser.contrast import faint_text
from tests.test_documents import NOTEBOOKS

README = ROOT / "README.md"
CSS = """
:root { color-scheme: light dark; --text: #1f2328; --ground: #ffffff; --box: #f6f8fa; --line: #d1d9e0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #f0f6fc; --ground: #0d1117; --box: #151b23; --line: #3d444d; } }
body { margin: 0; background: var(--ground); color: var(--text); }
.markdown-body { max-width: 980px; margin: 0 auto; padding: 16px; overflow-wrap: break-word;
  font: 16px/1.5 "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; }
pre, code { font-family: monospace; font-size: 85%; background: var(--box); }
pre, .formula, .output_area { overflow: auto; }
pre { padding: 16px; } pre code { font-size: 100%; }
table { display: block; width: max-content; max-width: 100%; overflow: auto; border-collapse: collapse; }
td, th { padding: 6px 13px; border: 1px solid var(--line); }
img { max-width: 100%; }
a { color: #4493f8; }
.prompt { font: 12px monospace; opacity: 0.6; }
"""
PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "mroot": 2, "msubsup": 3, "munderover": 3}
LOOK = """() => {
  const found = [], width = document.documentElement.clientWidth;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = texts.nextNode()); )
    if (text.data.includes('$') && !text.parentElement.closest('pre, code'))
      found.push('a raw $: ' + text.data.trim().slice(0, 80));
  for (const image of document.images)
    if (!image.src.startsWith('https:') && (!image.complete || image.naturalWidth === 0))
      found.push('a missing image: ' + image.getAttribute('src').slice(0, 80));
  if (document.documentElement.scrollWidth > width) {
    const wide = [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > width);
    const names = wide.map(e => `${e.localName} ${e.textContent.trim().slice(0, 40)}`);
    found.push('wider than the page: ' + names.slice(0, 9).join('; '));
  }
  return found;
}"""


def formula(source: str, options: dict) -> str:
    """The MathML of a formula, if it is well formed."""
    display = options["display_mode"]
    mathml = latex2mathml.converter.convert(source.strip(), display="block" if display else "inline")
    assert "\\" not in mathml, f"a formula with an unknown command: {source}"
    braces = re.sub(r"\\.", "", source)
    assert braces.count("{") == braces.count("}"), f"a formula with a brace too many: {source}"
    for part in ElementTree.fromstring(mathml).iter():
        complete = PARTS.get(part.tag.partition("}")[2], len(part)) == len(part)
        assert complete, f"a formula with something missing: {source}"
    return f'<div class="formula">{mathml}</div>' if display else mathml


MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
MARKDOWN.use(
    dollarmath_plugin,
    allow_labels=False,
    allow_space=False,
    allow_digits=False,
    double_inline=True,
    renderer=formula,
)
WITHOUT_MATHEMATICS = MarkdownIt("commonmark").enable("table")


def as_html(markdown: str) -> str:
    """Markdown as GitHub shows it. Markdown that knows no mathematics must leave the formulas alone, too."""
    plain = " ".join(html.unescape(WITHOUT_MATHEMATICS.render(markdown.replace("\\", r"\\"))).split())
    for token in MARKDOWN.parse(markdown):
        for part in (token, *(token.children or [])):
            if part.type.startswith("math"):
                assert " ".join(part.content.split()) in plain, f"Markdown changes this formula: {part.content}"
    return MARKDOWN.render(markdown)


def page_of(path: Path) -> str:
    """The whole page for a notebook or a Markdown file; pictures are looked for from the file's folder."""
    if path.suffix == ".ipynb":
        exporter = HTMLExporter(template_name="basic", filters={"markdown2html": as_html})
        body, _ = exporter.from_notebook_node(nbformat.read(path, as_version=4))
    else:
        body = as_html(path.read_text(encoding="utf-8"))
    body = re.sub(r"<(script|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<[^>]*?) style="[^"]*"', r"\1", body)
    head = f'<meta charset="utf-8"><base href="{path.parent.as_uri()}/"><style>{CSS}</style>'
    return (
        f'<!doctype html><html><head>{head}</head><body><article class="markdown-body">{body}</article></body></html>'
    )


def look(browser: Browser, page_html: str, name: str) -> list[str]:
    """What is wrong with a page at any width, in any colour scheme; its screenshots go to build/browser/github/."""
    folder = BUILD / "github"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.html"
    file.write_text(page_html, encoding="utf-8")
    found = []
    for device, width in (("desktop", 1280), ("phone", 390)):
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(240_000)  # a shared machine is slow
            page.route("https://**", lambda route: route.abort())  # badges come from the web, which may be away
            page.goto(file.as_uri())
            page.screenshot(path=folder / f"{name}-{device}-{scheme}.png", full_page=True)
            found += [f"{device}: {problem}" for problem in page.evaluate(LOOK)]
            page.close()
    return list(dict.fromkeys(found))


def see_through(png: bytes) -> bool:
    """Whether a picture has a transparent pixel: on a dark page, its dark text would vanish there."""
    return Image.open(io.BytesIO(png)).convert("RGBA").getchannel("A").getextrema()[0] < 255


@pytest.mark.parametrize("path", [README, *NOTEBOOKS], ids=name_of)
def test_looks_right_on_github(browser: Browser, path: Path) -> None:
    page = page_of(path)
    found = look(browser, page, name_of(path))
    for address in re.findall(r'<img[^>]* src="((?!https:)[^"]+\.png|data:image/png;base64,[^"]+)"', page):
        data = base64.b64decode(address.partition(",")[2]) if address.startswith("data:") else None
        file = path.parent / address
        if see_through(data or file.read_bytes()):
            found.append(f"a transparent picture: {address[:80]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("markdown", "problem"),
    [
        ("A formula $x^{2}$ and a wide $$\\sum_{i} " + "x + " * 99 + "y$$", ""),
        ("```\n" + "wide $code " * 99 + "\n```", ""),
        ("It costs $ 5.", "a raw $"),
        ("An open $x^{2} formula", "a raw $"),
        ("![a figure](nowhere.png)", "a missing image: nowhere.png"),
        ("an_endless_formula $" + "x + " * 99 + "y$", "wider than the page: "),
        ('<img src="images/svd.png" width="2000" alt="">', ""),
        ("<div><svg width='500' height='9'></svg></div>", "phone: wider than the page"),
    ],
)
def test_each_fault_of_a_page_is_caught(browser: Browser, tmp_path: Path, markdown: str, problem: str) -> None:
    file = tmp_path / "fault.md"
    file.write_text(markdown, encoding="utf-8")
    (tmp_path / "images").symlink_to(ROOT / "images")
    found = look(browser, page_of(file), "fault")
    assert bool(found) == bool(problem) and problem in "\n".join(found)


@pytest.mark.parametrize("source", [r"\frac{1}", r"\left( x", r"\nosuchcommand{x}", "x_{i"])
def test_a_broken_formula_is_caught(source: str) -> None:
    with pytest.raises(Exception):  # noqa: B017
        as_html(f"${source}$")


def test_markdown_inside_a_formula_is_caught() -> None:
    with pytest.raises(AssertionError, match="Markdown changes"):
        as_html("The products $a*b$ and $c*d$")


@pytest.mark.parametrize(
    ("colour", "ground", "faint"),
    [("black", "white", False), ("C1", "white", True), ("white", "black", False), ("0.6", "0.8", True)],
)
def test_faint_text_is_caught(colour: str, ground: str, faint: bool) -> None:
    figure, axes = plt.subplots(facecolor="white")
    axes.axis("off")  # its labels, black on the picture, are not drawn
    axes.add_patch(plt.Rectangle((0, 0), 1, 1, facecolor=ground))
    axes.text(0.5, 0.5, "label", color=colour)
    assert [("label" in line) for line in faint_text(figure)] == [True] * faint
    assert axes.texts[0].get_color() == colour
    plt.close(figure)


def test_the_concept_drawings_have_no_faint_text() -> None:
    nb.use_style()
    for name, draw in vars(draw_concepts).items():
        if name.startswith("draw_"):
            assert not faint_text(draw()), name
    plt.close("all")


@pytest.mark.parametrize("transparent", [True, False])
def test_a_transparent_picture_is_caught(transparent: bool) -> None:
    png = io.BytesIO()
    plt.figure().savefig(png, format="png", transparent=transparent)
    plt.close()
    assert see_through(png.getvalue()) == transparent
