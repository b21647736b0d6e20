"""Stop strings do not depend on where the text is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lacewing.engine.stops import StopStrings, Writer
from tests.engine.fakes import ByteDecoder


def slow_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the first moment at which the text ends in a stop string."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return text[: end - max(map(len, met))], True
    return text, False


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    filter = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, met = filter.push(piece)
        shown += text
        if met:
            return shown, True
    return shown + filter.flush(), False


letters = st.text("ab\n", max_size=4)


@given(st.lists(letters, max_size=10), st.lists(letters.filter(bool), max_size=3))
def test_equals_the_slow_twin(pieces: list[str], stops: list[str]) -> None:
    assert run(pieces, stops) == slow_cut("".join(pieces), stops)


@given(st.lists(letters, max_size=10), st.lists(letters.filter(bool), min_size=1, max_size=3))
def test_nothing_shown_is_ever_taken_back(pieces: list[str], stops: list[str]) -> None:
    filter = StopStrings(stops)
    final, _ = slow_cut("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        text, met = filter.push(piece)
        shown += text
        assert final.startswith(shown)
        if met:
            break


def test_holds_back_no_more_than_it_must() -> None:
    filter = StopStrings(["</end>"])
    assert filter.push("a < b </") == ("a < b ", False)
    assert filter.push("e") == ("", False)
    assert filter.push("m> ") == ("</em> ", False)
    assert filter.push("x</end>y") == ("x", True)


def test_without_stops_everything_passes_at_once() -> None:
    assert StopStrings([]).push("text") == ("text", False)


def test_a_stop_string_may_be_cut_inside_a_character() -> None:
    writer = Writer(ByteDecoder(), ["né"])
    shown, met = "", False
    for byte in "une année".encode():
        text, met = writer.push(byte)
        shown += text
        if met:
            break
    assert (shown, met) == ("une an", True)


def test_flush_gives_what_was_held_back() -> None:
    writer = Writer(ByteDecoder(), ["stop"])
    assert writer.push(ord("s")) == ("", False)
    assert writer.push(ord("t")) == ("", False)
    assert writer.flush() == ("st", False)
