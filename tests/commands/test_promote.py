"""What promote compares before it registers a run."""

from types import SimpleNamespace

from qflow.commands.promote import identity


def test_a_rebuild_asks_for_the_report_of_the_run(monkeypatch):
    same = {"weights": "w", "data": "d"}
    monkeypatch.setattr("qflow.study.manifest.manifest", lambda _: {**same, "profile": "abc"})

    def reasons(logged):
        return identity(None, SimpleNamespace(manifest=logged))

    assert reasons({**same, "profile": "abc"}) == []
    assert reasons({**same, "profile": "def"}) == ["measured times are not those of the run: abc instead of def"]
    assert reasons(same) == ["measured times are not those of the run: abc instead of none"]  # of an older run
