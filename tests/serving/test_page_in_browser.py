"""The page in a real browser: from pasted series to bands and experts, by keyboard, wide and narrow, light and dark."""

import os
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("fastapi_offline", reason="needs the extra serve")

from browser import Browser
from chronomoe import ChronoMoEPipeline
from chronomoe.models.chronos2 import use_exact_group_attention
from chronomoe.models.mixture.mixture import MixtureConfig, build_mixture
from chronomoe.models.mixture.router import RoutingConfig
from chronomoe.serving.app import create_app
from http_server import running
from moe_models import take_sides

DONE = "document.querySelectorAll('article').length > 0 && !document.getElementById('go').disabled"


@pytest.fixture(scope="module")
def client(make_teacher):
    experts = {
        name: use_exact_group_attention(make_teacher(seed=seed, num_layers=1))
        for seed, name in enumerate(("power", "traffic"))
    }
    mixture = build_mixture(experts, MixtureConfig(routing=RoutingConfig(top_k=2, threshold=0.99))).eval()
    pipelines = {"moe": ChronoMoEPipeline(take_sides(mixture)), "dense": ChronoMoEPipeline(make_teacher())}
    with running(create_app(pipelines)) as asking:
        yield asking


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture
def page(browser, client):
    browser.events.clear()
    browser.look()
    browser.open(f"http://127.0.0.1:{client.port}/")
    return browser


def ask(page, text, **fields):
    for name, value in ({"text": text} | fields).items():
        page.run(f"document.getElementById({name!r}).value = {value!r}")
    page.run("document.getElementById('results').replaceChildren(); document.getElementById('go').click()")


def test_pasted_series_become_bands_experts_and_reasons_and_nothing_leaves_the_server(page, client):
    page.run("document.getElementById('example').click()")
    assert page.run("document.getElementById('frequency').value") == "H"
    page.run("document.getElementById('go').click()")
    page.until(DONE)
    articles = page.run("[...document.querySelectorAll('article')].map((one) => one.innerText)")
    assert [text.splitlines()[0] for text in articles] == ["visits", "stock"]
    assert all("power" in text or "traffic" in text for text in articles)
    assert all("Why" in text and "for it" in text for text in articles)
    assert page.run("document.querySelectorAll('article .band').length") == 4
    assert page.run("document.querySelectorAll('article tbody tr').length") == 2 * 48
    assert "2 series forecast in" in page.run("document.getElementById('status').textContent")
    assert page.complaints() == []
    assert all(url.startswith((f"http://127.0.0.1:{client.port}/", "data:")) for url in page.hosts())


def test_the_page_is_used_by_keyboard_alone(page):
    page.send("Input.insertText", text="")
    page.run("document.getElementById('text').focus()")
    page.send("Input.insertText", text="5 6 7 8 5 6 7 8 5 6 7 8 5 6 7 8")
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        if seen[-1] == "go":
            break
    assert seen == ["file", "example", "model", "horizon", "frequency", "go"]
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"
    page.press("Enter", text="\r")
    page.until(DONE)
    page.run("document.getElementById('go').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.getAttribute('role')") == "img"
    page.press("End")
    assert page.run("document.querySelector('output').value").startswith("Step +48: median")
    page.press("Home")
    page.press("ArrowRight")
    assert page.run("document.querySelector('output').value") == "15 steps ago: 6"
    assert page.complaints() == []


READ = {
    "1, 2, , 4": [("series 1", [1, 2, None, 4])],
    "1\n2\nnan\n4": [("series 1", [1, 2, None, 4])],
    "1 2 3\n4 5 6": [("series 1", [1, 2, 3]), ("series 2", [4, 5, 6])],
    "timestamp,a,b\n2025-01-01,1,2\n2025-01-02,,4": [("a", [1, None]), ("b", [2, 4])],
    'item_id;timestamp;target\n"x";2025-01-01;1\ny;2025-01-01;3\nx;2025-01-02;2': [("x", [1, 2]), ("y", [3])],
    "date\ttarget\n2025-01-01\t1\n2025-01-02\t-2.5e3": [("series 1", [1, -2500])],
}


@pytest.mark.parametrize("text", READ)
def test_pasted_text_is_read(page, text):
    found = page.run(f"import('./page.js').then((page) => page.read({text!r}).map((one) => [one.name, one.values]))")
    assert [(name, values) for name, values in found] == READ[text]


@pytest.mark.parametrize(
    ("text", "fields", "said"),
    [
        ("a, b, c", {}, "There is a header, but no values below it."),
        ("1, 2\n3, x4", {}, 'Line 2: "x4" is not a number'),
        ("1 2 3", {"horizon": "5000"}, "may have at most 1024 steps here, got 5000"),
        ("nan nan", {}, "needs at least one value"),
    ],
)
def test_what_is_wrong_is_said_in_words(page, text, fields, said):
    ask(page, text, **fields)
    page.until("document.getElementById('status').className === 'bad'")
    assert said in page.run("document.getElementById('status').textContent")


def test_names_are_text_and_never_markup(page):
    name = '<img src=x onerror="document.title=1">'
    ask(page, f"timestamp\t{name}\n1\t2\n2\t3\n3\t4")
    page.until(DONE)
    assert page.run("document.querySelector('article h2').textContent") == name
    assert page.run("document.querySelectorAll('article img').length") == 0
    assert page.run("document.title") == "ChronoMoE: forecasts"


def test_a_constant_and_a_single_value_are_drawn(page):
    ask(page, "7 7 7 7 7", horizon="1")
    page.until(DONE)
    assert page.run("document.querySelectorAll('svg .dot').length") == 1
    ask(page, "7", horizon="3")
    page.until(DONE)
    assert page.run("document.querySelectorAll('svg [d*=NaN], svg [y1=NaN]').length") == 0


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (380, False), (380, True)])
def test_wide_and_narrow_light_and_dark(page, width, dark, tmp_path):
    page.look(width=width, dark=dark)
    page.run("document.getElementById('example').click()")
    page.run("document.getElementById('go').click()")
    page.until(DONE)
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off"
    shades = page.run(
        "['background-color', 'color'].map((name) => getComputedStyle(document.body).getPropertyValue(name)"
        ".match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
    )
    assert (shades[0] < shades[1]) == dark
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    path = folder / f"page-{width}-{'dark' if dark else 'light'}.png"
    page.screenshot(path)
    assert path.stat().st_size > 10_000
