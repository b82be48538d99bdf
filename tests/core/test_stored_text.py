"""Texts from outside, as the stores keep them."""

from hypothesis import given
from hypothesis import strategies as st

from qflow.core.stored_text import one_line, printable, stored_text


@given(st.text(st.characters() | st.sampled_from("\x00\ud800\udcff")), st.integers(1, 40) | st.none())
def test_a_stored_text_is_utf8_without_nul_bounded_and_its_own_result(text, most):
    found = stored_text(text, most)
    assert b"\x00" not in found.encode()
    assert most is None or len(found) <= most
    assert stored_text(found, most) == found


def test_what_cannot_be_stored_is_written_out():
    assert stored_text("a\x00b \ud800") == r"a\x00b \ud800"
    assert stored_text("abcdef", 4) == "abc…"


@given(st.text(st.characters() | st.sampled_from("\x00\x1b\n\r\ud800")), st.integers(3, 40))
def test_a_line_is_printable_bounded_and_one(text, most):
    found = one_line(text, most)
    assert found.isprintable()
    assert one_line(text) == found or len(" ".join(text.split())) > most
    assert printable(text, most).count("\n") == text.count("\n")


def test_a_long_line_keeps_its_end_and_a_table_its_columns():
    assert one_line("a\x1b[31m\nb") == r"a\x1b[31m b"
    assert one_line(f"The rule, but got {'x' * 10**6}. The way out.", 60).endswith("x. The way out.")
    assert len(one_line("x" * 10**6, 60)) <= 63
    assert printable("a   1\nb   2\r") == "a   1\nb   2\\r"
