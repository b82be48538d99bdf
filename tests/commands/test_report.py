"""The report of a real study: printed at its end, and rendered again from the store alone."""

import re

import pytest
from report.test_page import charts_of
from support.browser import CHROMIUM, browser, mlflow_ui, required
from support.commands import OWN, open_tracker, run_qflow
from support.documents import document

pytestmark = pytest.mark.slow  # starts commands as processes of their own

PLACE = "qflow_out/studies/own/int8_int16/report.html"


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    done = run_qflow("tune", *OWN, "search.n_trials=6", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def test_the_end_of_a_study_names_the_report_and_its_address_in_mlflow(studied):
    folder, done = studied
    assert f"\nreport      {folder / PLACE}\n" in done.stdout
    run = open_tracker(folder).find_study("own/int8_int16")
    page = f"runs/{run}/artifacts/report.html?workflowType=machine_learning"
    assert re.search(rf"^ {{12}}http://127\.0\.0\.1:5000/#/experiments/\d+/{re.escape(page)}$", done.stdout, re.M)
    kept = open_tracker(folder).download(run, "report.html", folder / "got")
    assert kept.read_text() == (folder / PLACE).read_text()


def test_the_report_holds_the_study(studied):
    folder, done = studied
    page = (folder / PLACE).read_text()
    front, path, *_ = charts_of(page)
    marks = [p[2] for s in front["series"] if s.get("mark") for p in s["points"]]
    assert len(marks) == 6 and path["kind"] == "xy"
    (network,) = [c for c in charts_of(page) if c["kind"] == "network"]
    assert len(network["ops"]) > 3 and {op["dtype"] for op in network["ops"]} >= {"qint8", "qint16"}
    decided = re.findall(r"^decision +([^:]+): (.*)$", done.stdout, re.M)
    assert decided and all(f"<b>{stage}</b>" in page for stage, _ in decided)
    assert "paired by sample" in page and "20 finished trials are needed" in page
    assert "The study&#x27;s run does not hold it" not in page and "was not run" not in page


def test_the_command_renders_the_same_report_without_model_and_data(studied):
    folder, _ = studied
    before = (folder / PLACE).read_text()
    (folder / PLACE).unlink()
    again = run_qflow("report", "study=own/int8_int16", "--json", cwd=folder, PYTHONPATH="")  # no code is found
    assert again.returncode == 0, again.stderr
    assert (folder / PLACE).read_text() == before
    assert document(again)["result"]["written"] == str(folder / PLACE)


def test_a_study_that_does_not_exist_is_one_line(studied):
    folder, _ = studied
    done = run_qflow("report", "study=nope", "tracking.experiment=own", cwd=folder)
    assert done.returncode == 2 and "A report is of a study in the store, but got nope" in done.stderr


@pytest.mark.skipif(not CHROMIUM and not required(), reason="no chromium here; CI installs one and never skips")
def test_the_printed_link_opens_the_report_in_the_mlflow_ui(studied):
    from selenium.webdriver.support.ui import WebDriverWait

    folder, done = studied
    link = re.search(r"http://127\.0\.0\.1:5000(/\S+report\.html\S*)", done.stdout)[1]
    with mlflow_ui(folder / "qflow_out") as host, browser(1400, 900) as driver:
        driver.get(f"{host}{link}")
        wait = WebDriverWait(driver, 120)
        driver.switch_to.frame(wait.until(lambda d: d.find_element("css selector", "iframe")))
        marks = "#pareto-front .chart > svg .mark"
        wait.until(lambda d: len(d.find_elements("css selector", marks)) == 6)
