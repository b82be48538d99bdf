"""JSON and YAML of others: what reaches further is plain data, and a hostile file costs no time."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.bundle.bounded import read_config, read_json
from qflow.config.build import build_model
from qflow.config.settings import load_resolved
from qflow.core.errors import BundleError, ConfigError

INTERPOLATIONS = ['"${oc.env:HOME}"', r'"\x24{oc.env:HOME}"', r'"\u0024{oc.env:HOME}"', r'"\\\x24{oc.create:{a: 1}}"']


@pytest.mark.parametrize("text", INTERPOLATIONS)
@pytest.mark.parametrize(
    "place", ["study: {}", "qconfig: {{modules: {{{}: qint16}}}}", "task: {{model: {{a: [[{}]]}}}}"]
)
def test_an_interpolation_is_refused_however_it_is_written(text, place, tmp_path):
    (tmp_path / "config.yaml").write_text(place.format(text))
    with pytest.raises(BundleError, match="an interpolation"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", [r"\${a}", {"${a}": 1}, [[r"x\${oc.env:HOME}"]]])
def test_what_is_built_is_not_resolved_a_second_time(value):
    config = load_resolved("study: a")
    config.task.model = {"_target_": "builtins.dict", "a": 1}
    assert build_model(config) == {"a": 1}
    config.task.model = {"_target_": "builtins.dict", "a": value}
    with pytest.raises(ConfigError, match="Values of task.model are resolved before it is built, but got one with"):
        build_model(config)


def test_a_text_without_an_end_is_read_in_linear_time(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'\\"' * 300_000)
    start = time.monotonic()
    with pytest.raises(BundleError, match="no JSON"):
        read_json(tmp_path, "manifest.json")
    assert time.monotonic() - start < 2.0


@given(st.text(st.sampled_from('ab"\\[]{}\n')), st.integers(1, 40))
def test_only_brackets_outside_of_texts_are_levels(tmp_path_factory, text, levels):
    import json

    folder = tmp_path_factory.getbasetemp()
    value = {text: text}
    for _ in range(levels - 1):
        value = [value]
    (folder / "manifest.json").write_text(json.dumps(value))
    if levels <= 32:
        assert read_json(folder, "manifest.json") == value
    else:
        with pytest.raises(BundleError, match="nesting deeper than 32"):
            read_json(folder, "manifest.json")
