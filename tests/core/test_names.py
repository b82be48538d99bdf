"""Names of studies and tasks."""

import pytest

from qflow.core.errors import ConfigError
from qflow.core.names import check_study_name, check_task_name


@pytest.mark.parametrize(
    "name", ["a/b: c=1, 50% (ü)", "veh/lane:v1", "../x", "a/../b", "/a", "a//b", "", ".", "it's", "x" * 999, "名" * 40]
)
def test_a_refused_study_name_comes_with_one_that_is_allowed(name):
    with pytest.raises(ConfigError, match="Rename it: study=") as caught:
        check_study_name(name)
    check_study_name(str(caught.value).rpartition("study=")[2].removesuffix("."))


@pytest.mark.parametrize("name", ["it's", "../x", "a/../b", "/a", "", "..", "a\\b", "a\nb", "x" * 999])
def test_a_refused_task_name_comes_with_one_that_is_allowed(name):
    with pytest.raises(ConfigError, match="Rename it: task.name=") as caught:
        check_task_name(name)
    assert "\n" not in str(caught.value)
    check_task_name(str(caught.value).rpartition("task.name=")[2].removesuffix("."))


@pytest.mark.parametrize("name", ["own", "lane net", "veh/lane:v1", "車道 v1.2", "a=b & c"])
def test_a_task_may_have_other_characters(name):
    check_task_name(name)
