"""The page for programs: its commands in their order, read from the page, with nothing but their documents."""

import re
import shlex
from pathlib import Path

import pytest
from support.commands import run_qflow
from support.documents import document

PAGE = (Path(__file__).parents[2] / "docs" / "for-programs.md").read_text()
LINES = [line for line in PAGE.split("```sh\n")[1].split("```")[0].splitlines() if line.startswith("qflow ")]
SMALL = {"tune": ["+debug=tiny", "repair=none"], "check": ["calibration.steps=2"]}


def filled(line, documents):
    """The words of a line of the page, with the fields of earlier documents in their places."""

    def field(found):
        command, *path = found[1].split(".")
        value = documents[command]
        for name in path:
            value = value[name]
        return value

    return shlex.split(re.sub(r"<([^>]*)>", field, line))


@pytest.mark.slow
def test_the_commands_of_the_page_lead_to_a_promoted_mix(tmp_path):
    documents = {}
    for line in LINES:
        _, name, *words = filled(line, documents)
        found = document(run_qflow(name, *words, *SMALL.get(name, []), cwd=tmp_path))
        assert found["exit_code"] == 0, (line, found)
        documents[name] = found
    promoted, exported = documents["promote"]["result"], documents["export"]["result"]
    assert (promoted["verdict"], promoted["version"]) == ("ACCEPT", 1)
    assert promoted["run"] == exported["run"] == documents["tune"]["result"]["best"]["run"]
    assert Path(exported["folder"], "qflow", exported["targets"]["qflow"]["files"][0]).is_file()
    assert all(seen["ok"] for seen in documents["doctor"]["result"]["findings"].values())
