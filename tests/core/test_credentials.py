"""Passwords and tokens in addresses are shown nowhere."""

import pytest

from qflow.core.credentials import masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://bob:s3cret@host:5000", "http://bob:***@host:5000"),
        ("postgresql+psycopg2://bob:s3@cret:x@db/mlflow", "postgresql+psycopg2://bob:***@db/mlflow"),
        ("https://s3cret@host/x", "https://***@host/x"),
        ("http://:s3cret@host", "http://:***@host"),
        ("a 'http://u:s3cret@h' and http://v:s3cret@i.", "a 'http://u:***@h' and http://v:***@i."),
        ("mysql://h/db?user=bob&password=s3cret&x=1", "mysql://h/db?user=bob&password=***&x=1"),
        ("postgresql://h/db?sslpassword=s3cret", "postgresql://h/db?sslpassword=***"),
        ("s3://h/x?X-Amz-Signature=s3cret", "s3://h/x?X-Amz-Signature=***"),
        ("uri: http://u:s3cret@h\nother: me@here", "uri: http://u:***@h\nother: me@here"),
    ],
)
def test_a_password_is_hidden(text, shown):
    assert masked(text) == shown
    assert "cret" not in shown


@pytest.mark.parametrize(
    "text",
    ["sqlite:////data/mlflow.db", "http://host:5000/#/models/net@champion", "models:/net@champion", "a@b: c://d/e@f"],
)
def test_an_address_without_one_is_left_as_it_is(text):
    assert masked(text) == text
