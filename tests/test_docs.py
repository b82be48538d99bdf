"""The pages of docs/ are short, and what README and the code name exists. `make docs` checks links between pages."""

from __future__ import annotations

import re

import pytest

from tests.support.architecture import ROOT

PAGES = sorted((ROOT / "docs").rglob("*.md"))
LONGEST = 135  # lines of at most 120 characters: about three screens


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_takes_at_most_three_screens(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= LONGEST


@pytest.mark.parametrize(
    "text", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name
)
def test_links_of_the_files_beside_the_code_lead_somewhere(text):
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]*[./][^)#\s]*)", text.read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_pages_that_the_code_names_exist():
    files = [
        p
        for folder in ("qflow", "conf", "workflows", "benchmarks")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".yaml")
    ]
    named = {name for path in files for name in re.findall(r"docs/[\w./-]+\.(?:md|png|svg)", path.read_text())}
    assert named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
