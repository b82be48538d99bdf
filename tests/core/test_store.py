"""Database files and their URLs."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from qflow.core import store
from qflow.core.errors import TrackingError
from qflow.core.store import build_aside, sqlite_path, sqlite_url

PARTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(st.lists(PARTS, min_size=1, max_size=3))
def test_a_url_names_the_same_file_to_us_and_to_sqlalchemy(parts):
    path = Path("/").joinpath(*parts)
    url = sqlite_url(path)
    assert sqlite_path(url) == path
    assert make_url(url).database == str(path)
    assert url.isprintable() or not str(path).isprintable()
    assert url.format(x=1) == url  # Optuna fills braces in


def test_an_ordinary_path_is_written_as_it_is():
    assert sqlite_url(Path("/data/a b/optuna.db")) == "sqlite:////data/a b/optuna.db"
    assert sqlite_path("sqlite:////data/x.db?timeout=3") == Path("/data/x.db")
    assert sqlite_path("postgresql://host/x") is None


def test_a_path_that_an_older_sqlalchemy_would_not_decode_is_refused(monkeypatch):
    monkeypatch.setattr(store, "version", lambda name: "2.0.58")
    assert sqlite_url(Path("/data/a b/optuna.db")) == "sqlite:////data/a b/optuna.db"
    with pytest.raises(TrackingError, match=r"no %.*but got '/data/100%/x\.db'\. Rename the folder"):
        sqlite_url(Path("/data/100%/x.db"))


def test_leftovers_of_a_name_with_brackets_are_removed(tmp_path):
    path = tmp_path / "[x].db"
    leftover = tmp_path / "[x].db.init-1"
    leftover.write_text("of a process that was killed")
    build_aside(path, lambda url: sqlite3.connect(str(sqlite_path(url))).close())
    assert path.exists()
    assert not leftover.exists()
