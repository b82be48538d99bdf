"""The pages in a real browser: no error in light, dark and at 420 pixels; charts hold all trials; links, keys work."""

import http.server
import threading
from dataclasses import replace
from functools import partial

import pytest
from selenium.webdriver.support.ui import WebDriverWait
from support.browser import CHROMIUM, browser, console, required
from support.study_records import record
from support.synthetic import advice, badcases, layers, sensitivity

from qflow.report.analysis_page import Analysis, analysis_page
from qflow.report.study_page import study_page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM and not required(), reason="no chromium here; CI installs one and never skips"),
]
VIEWS = {"light": {}, "dark": {"dark": True}, "narrow": {"width": 420}}
TRIALS, OPERATORS = 120, 90


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = record(TRIALS, OPERATORS, trained=True)
    evil = replace(made, verdict="</script><img src=http://127.0.0.1:9/x onerror=alert(1)>")
    (folder / "report.html").write_text(study_page(evil), encoding="utf-8")
    scores = sensitivity(OPERATORS)
    analysis_page(folder / "analysis.html", "all-int8", Analysis(layers(OPERATORS), scores, badcases(), advice()), {})
    return folder


@pytest.fixture(scope="module", params=VIEWS)
def driver(request):
    with browser(**VIEWS[request.param]) as made:
        yield made


@pytest.mark.parametrize("name", ["report.html", "analysis.html"])
def test_a_page_has_no_console_error_and_no_text_beyond_its_width(driver, pages, name):
    driver.get(f"file://{pages / name}")
    assert console(driver) == []
    wide, room = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room
    drawn = driver.execute_script("return [...document.querySelectorAll('.chart')].map(c => !!c.querySelector('svg'))")
    assert drawn and all(drawn)


def test_charts_hold_all_trials_and_the_network_all_operators(driver, pages):
    driver.get(f"file://{pages / 'report.html'}")
    front, path = (
        f"document.querySelectorAll('#{place} .chart > svg .mark')" for place in ("pareto-front", "path-of-the-search")
    )
    WebDriverWait(driver, 20).until(lambda _: driver.execute_script(f"return {path}.length") >= TRIALS)  # drawn late
    assert driver.execute_script(f"return {front}.length") == TRIALS
    boxes = "return document.querySelectorAll('#the-network .chart > svg .op').length"
    assert driver.execute_script(boxes) == OPERATORS + 2
    # every mark lies inside its chart
    outside = """const box = document.querySelector('#pareto-front .chart > svg').getBoundingClientRect();
        return [...arguments[0]].filter(m => { const b = m.getBoundingClientRect();
            return b.left < box.left - 1 || b.right > box.right + 1 || b.bottom > box.bottom + 1; }).length"""
    assert driver.execute_script(outside.replace("arguments[0]", front)) == 0


def test_the_scheme_changes_the_colours(pages):
    shades = {}
    for name in ("light", "dark"):
        with browser(**VIEWS[name]) as driver:
            driver.get(f"file://{pages / 'report.html'}")
            shades[name] = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert shades == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 24, 28)"}


def test_tables_open_and_contents_lead_to_their_sections(driver, pages):
    driver.get(f"file://{pages / 'report.html'}")
    rows = "document.querySelectorAll('#path-of-the-search details table tbody tr')"
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert (
        driver.execute_script(f"return [...{rows}].filter(r => r.getBoundingClientRect().height > 0).length") >= TRIALS
    )
    broken = "return [...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.hash)).length"
    assert driver.execute_script(broken) == 0


def test_a_mark_shows_its_trial_and_links_to_its_run(driver, pages):
    from selenium.webdriver.common.action_chains import ActionChains

    driver.get(f"file://{pages / 'report.html'}")
    star = driver.find_element("css selector", "#pareto-front .c1 a .mark")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", star)
    ActionChains(driver).move_to_element(star).perform()
    shown = driver.find_element("css selector", ".tip")
    assert shown.is_displayed() and "meets the goal" in shown.text
    link = driver.execute_script("return arguments[0].closest('a').href.baseVal", star)
    assert link.startswith("http://127.0.0.1:5000/#/experiments/1/runs/")


def test_the_keyboard_walks_over_the_marks_and_zooms_the_network(driver, pages):
    driver.get(f"file://{pages / 'report.html'}")
    front = driver.find_element("css selector", "#pareto-front .chart > svg")
    driver.execute_script("arguments[0].focus()", front)
    texts = []
    for _ in range(3):
        front.send_keys("\ue014")  # the right arrow
        texts.append(driver.find_element("css selector", ".tip").text)
    assert len(set(texts)) == 3 and all(text.startswith("trial ") for text in texts)
    network = driver.find_element("css selector", "#the-network .chart > svg")
    moved = "return document.querySelector('#the-network .chart > svg > g').getAttribute('transform')"
    before = driver.execute_script(moved)
    driver.execute_script("arguments[0].focus()", network)
    network.send_keys("+")
    assert driver.execute_script(moved) != before
    network.send_keys("0")
    assert driver.execute_script(moved) == before


def test_an_override_is_copied(driver, pages):
    driver.get(f"file://{pages / 'analysis.html'}")
    button = driver.find_element("css selector", "button[data-copy]")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    button.click()
    done = ("copied", "not allowed here")  # a browser without a window may have no clipboard
    WebDriverWait(driver, 20).until(lambda _: button.text in done)
    assert console(driver) == []


FRAME = """<script>fetch('report.html').then(r => r.text()).then(text => {
    const frame = document.createElement('iframe');
    frame.sandbox = 'allow-scripts'; frame.width = 1200; frame.height = 800;
    frame.src = URL.createObjectURL(new Blob([text], {type: 'text/html'}));
    document.body.append(frame); })</script>"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_page_works_inside_the_frame_in_which_mlflow_shows_it(pages):
    """MLflow makes a blob of an HTML artifact, in a sandboxed frame that may run scripts and nothing else."""
    from selenium.webdriver.support.ui import WebDriverWait

    (pages / "frame.html").write_text(f'<link rel="icon" href="data:,"><body>{FRAME}</body>')
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with browser() as driver:
            driver.get(f"http://127.0.0.1:{server.server_port}/frame.html")
            driver.switch_to.frame(WebDriverWait(driver, 20).until(lambda d: d.find_element("css selector", "iframe")))
            marks = "#pareto-front .chart > svg .mark"
            WebDriverWait(driver, 20).until(lambda d: len(d.find_elements("css selector", marks)) == TRIALS)
            assert console(driver) == []
    finally:
        server.shutdown()
