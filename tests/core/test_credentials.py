"""Passwords and tokens in addresses are shown nowhere."""

from urllib.parse import unquote, unquote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from qflow.core.credentials import masked, masked_values, without_user

ODD = "@:/?#&=%;'\" \n*+[]\\.ab12\t"
"""What ends a part of an address somewhere."""


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
        ("postgresql://bob:s3c/re#t?@h/db", "postgresql://bob:***@h/db"),
        ("from http://bob:s3 cret@h.", "from http://bob:***@h."),
        ("postgresql://b'ob:s3cret@h/db", "postgresql://b'ob:***@h/db"),
        ("postgresql://bob:s3cret/db", "postgresql://bob:***/db"),
        ("postgresql://h/db?password='s3 cret'&x=1", "postgresql://h/db?password=***&x=1"),
        ("postgresql://h/db?options=-c%20password%3Ds3cret", "postgresql://h/db?options=***"),
        ("postgresql://h/db?pass%77ord=s3cret", "postgresql://h/db?pass%77ord=***"),
        ("s3://h/x?AWSAccessKeyId=s3cret&sig=s3cret", "s3://h/x?AWSAccessKeyId=***&sig=***"),
        ("host=h password = 's3 cret' port=1", "host=h password = *** port=1"),
        ("MLFLOW_TRACKING_TOKEN=s3cret was set", "MLFLOW_TRACKING_TOKEN=*** was set"),
        ("{'user': 'bob', 'password': 's3cret'}", "{'user': 'bob', 'password': ***}"),
        ("Authorization: Basic s3cret", "Authorization: Basic ***"),
        ("Bearer s3cret", "Bearer ***"),
        ("uri: http://u:s3cret@h\nother: me@here", "uri: http://u:***@h\nother: me@here"),
    ],
)
def test_a_password_is_hidden(text, shown):
    assert masked(text) == shown
    assert "cret" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/mlflow.db",
        "http://host:5000/#/models/net@champion",
        "models:/net@champion",
        "a@b: c://d/e@f",
        "got none from http://host:5000. Load models:/net@champion",
        "http://host: refused",
        "http://HOST:PORT",
        "a.key=1",
    ],
)
def test_an_address_without_one_is_left_as_it_is(text):
    assert masked(text) == text


@settings(max_examples=100, deadline=None)
@given(
    secret=st.text(ODD, min_size=4) | st.text(st.characters(codec="utf-8"), min_size=4),
    form=st.sampled_from(["x://bob:{}@host/db", "x://:{}@host", "x://b o'b:{}@host:1/db?y=1", "x://{}@host",
                          "x://host/db?password={}", "x://host:1/db?y=1&sslpassword={}&z=2", "x://host/?sig='{}'"]),
)  # fmt: skip
def test_no_password_that_sqlalchemy_reads_is_shown(secret, form):
    address = form.format(secret)
    try:
        read = make_url(address)
    except ValueError:  # text where the port should be
        return
    user = read.username if read.password is None else read.password
    found = [user, *(read.query.get(name) for name in ("password", "sslpassword", "sig"))]
    known = [text for text in found if isinstance(text, str) and len(text) >= 4 and text not in form]
    written = [secret] if {unquote(secret), unquote_plus(secret)} & {text.strip("'") for text in known} else []
    assert not [text for text in [*known, *written] if text in masked(address)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="@\n*"), min_size=4))
def test_no_password_is_shown_in_a_line(secret):
    line = f"got no answer from postgresql://bob:{secret}@host/db."
    assert secret not in masked(line).replace("got no answer from postgresql://bob:***@host/db.", "")


def test_values_are_masked_before_they_are_broken_into_lines():
    address = f"postgresql://bob:{'s3cret ' * 20}@host/db"
    assert masked_values({"a": [address], "b": 1}) == {"a": ["postgresql://bob:***@host/db"], "b": 1}
    assert without_user(address) == "postgresql://host/db"
