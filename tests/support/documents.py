"""What a command writes with `--json`, held to the schema that `qflow describe` gives of it."""

import json

from jsonschema import Draft202012Validator

from qflow.config import json_output
from qflow.config.json_schema import document_schema


def document(done):
    """The one document on stdout of a command, which fits its schema and has the exit code of the process."""
    found = fitting(done.stdout)
    assert found["exit_code"] == done.returncode, done.stderr
    return found


def fits(name, ended):
    """What a command's function returned, (exit code, fields), of which the document fits its schema."""
    fitting(json_output.document(name, ended[0], "", ended[1], None))
    return ended


def fitting(text):
    found = json.loads(text, parse_constant=lambda name: f"{name} is no JSON")
    problems = list(Draft202012Validator(document_schema(found["command"])).iter_errors(found))
    assert not problems, [f"{error.json_path}: {error.message[:500]}" for error in problems]
    return found
