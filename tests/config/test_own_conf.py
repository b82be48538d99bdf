"""conf/ of the working folder is found, and its files stay apart from the shipped ones."""

import pytest
from support.compose import ended

from qflow.config.completion import complete
from qflow.config.own_conf import own_conf
from qflow.core.errors import ConfigError

MINE = "defaults: [digits, _self_]\nname: mine\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "conf/task").mkdir(parents=True)
    (tmp_path / "conf/task/mine.yaml").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_option_of_the_working_folder_is_composed_and_completed(folder, capsys):
    seen = []
    code, error = ended(capsys, "check", lambda config: seen.append(config.task.name) or 0, "task=mine")
    assert (code, error, seen) == (0, "", ["mine"])
    assert complete("qflow check task=mi") == ["task=mine"]


def test_a_file_with_the_name_of_a_shipped_one_is_refused_where_it_is_chosen(folder):
    (folder / "conf/task/digits.yaml").write_text(MINE)
    with pytest.raises(ConfigError, match="another name than a shipped one, but got conf/task/digits.yaml. Rename it."):
        own_conf(["+experiment=int8", "task=digits"])
    assert own_conf(["task=mine"]) == [folder / "conf"]


@pytest.mark.parametrize("said", ["--config-dir", "-cd", "hydra.searchpath=[file:///x]"])
def test_places_that_the_user_names_come_alone(folder, said):
    assert own_conf([said, "task=mine"]) == []


def test_a_folder_without_conf_adds_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert own_conf(["task=mine"]) == []
