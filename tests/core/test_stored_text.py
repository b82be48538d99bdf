"""Texts from outside, as the stores keep them."""

from hypothesis import given
from hypothesis import strategies as st

from qflow.core.stored_text import stored_text


@given(st.text(st.characters() | st.sampled_from("\x00\ud800\udcff")), st.integers(1, 40) | st.none())
def test_a_stored_text_is_utf8_without_nul_bounded_and_its_own_result(text, most):
    found = stored_text(text, most)
    assert b"\x00" not in found.encode()
    assert most is None or len(found) <= most
    assert stored_text(found, most) == found


def test_what_cannot_be_stored_is_written_out():
    assert stored_text("a\x00b \ud800") == r"a\x00b \ud800"
    assert stored_text("abcdef", 4) == "abc…"
