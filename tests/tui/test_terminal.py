"""Cleaning text for the terminal: control sequences are removed, all other text is kept."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from llm_edge.chat.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),  # CSI: colours, cursor, screen
        ("\x1b[2J\x1b[H", "[2J[H"),
        ("\x1b]0;title\x07", "]0;title"),  # OSC: window title
        ("\x1b]52;c;cm0gLXJmIH4=\x07", "]52;c;cm0gLXJmIH4="),  # the clipboard
        ("\x1b]8;;https://a.example\x1b\\text\x1b]8;;\x1b\\", "]8;;https://a.example\\text]8;;\\"),
        ("\x1bP1$r\x1b\\", "P1$r\\"),  # DCS
        ("\x1bc", "c"),  # full reset
        ("\x9b31mred\x9d0;title\x9c\x90q", "31mred0;titleq"),  # the same with C1 characters
        ("\x85next line", "next line"),
        ("rm -rf ~\rls     ", "rm -rf ~ls     "),  # overwritten by what follows
        ("abc\b\b\bxyz", "abcxyz"),
        ("bell\x07 null\x00 shift\x0e\x0f del\x7f", "bell null shift del"),
        ("\x0b\x0c", ""),
        ("user\u202enimda\u202c", "usernimda"),  # shown backwards
        ("a\u2066b\u2067c\u2068d\u2069e", "abcde"),
        ("\u200e\u200f\u061cmarks\u202a\u202b\u202d", "marks"),
        ("half \ud83d pair \udc4b", "half  pair "),
    ],
)
def test_control_sequences_are_removed(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain ASCII ~!@#$%^&*()[]{}",
        "two\nlines\n\tand a tab",
        "👩\u200d👩\u200d👧 👋🏽 ❤\ufe0f 🇫🇷 1\ufe0f\u20e3",  # joiners, skin tones, variation selectors, flags, keycaps
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",  # tags
        "שלום, العربية, فارسی",
        "می\u200cکنم",  # a non-joiner inside a word
        "हिन्दी ไทย 你好 é e\u0301 ÿ\u00a0ß",
        "𓀀 \U0010fffd",
    ],
)
def test_text_is_kept(text: str) -> None:
    assert printable(text) == text


def test_no_control_character_is_left() -> None:
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(everything)
    assert {c for c in shown if unicodedata.category(c) in ("Cc", "Cs")} == {"\n", "\t"}
    commands = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert not commands & set(map(unicodedata.bidirectional, shown))
    assert len(everything) - len(shown) == 63 + 12 + 2048  # controls but two, bidirectional marks, surrogates


def test_text_may_be_cleaned_in_parts() -> None:
    text = "a\x1b[31m\r\n👩\u200d👧\u202e\x9b1m"
    assert "".join(map(printable, text)) == printable(text)
