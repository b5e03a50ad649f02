"""Label maps: which labels are positive."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dslify.errors import OptionError
from dslify.omega import Omega, omega

DIGITS = [str(digit) for digit in range(10)]
WORDS = ["background", "yes", "no", "up", "unknown"]


def positives(words, labels) -> list[str]:
    found = omega(words, labels).positive(labels)
    assert found.dtype == bool
    assert found.shape == (len(labels),)
    return [label for label, one in zip(labels, found, strict=True) if one]


@pytest.mark.parametrize(
    ("words", "labels", "expected"),
    [
        ("1-9", DIGITS, DIGITS[1:]),
        ("0,4-6", DIGITS, ["0", "4", "5", "6"]),
        ("1-9,!5", DIGITS, ["1", "2", "3", "4", "6", "7", "8", "9"]),
        ("1-9,!5,5", DIGITS, DIGITS[1:]),
        ("!0-3", DIGITS, DIGITS[4:]),
        ("yes,no,up", WORDS, ["yes", "no", "up"]),
        (" yes , up ", WORDS, ["yes", "up"]),
        ("!background", WORDS, ["yes", "no", "up", "unknown"]),
        ("!background,!unknown", WORDS, ["yes", "no", "up"]),
        ({"yes", "up"}, WORDS, ["yes", "up"]),
        (["up"], WORDS, ["up"]),
        ({1, 2}, DIGITS, ["1", "2"]),
        (lambda label: label in ("yes", "no"), WORDS, ["yes", "no"]),
        (lambda label: np.bool_(len(label) > 3), WORDS, ["background", "unknown"]),
        ("1-9", ["01", "10", "09", "one"], ["01", "09"]),  # folders' names with leading zeros
        ("2", ["1.0", "2.0", "2.5"], ["2.0"]),  # labels of a float array
        ("1-9", ["1-9", "5"], ["1-9"]),  # a word that is a label means that label
        ("!x", ["!x", "x"], ["!x"]),
        ("left,right", ["left,right", "left", "right"], ["left,right"]),
        ({"1-9"}, ["1-9", "5"], ["1-9"]),  # of a set each word is taken literally
    ],
)
def test_words(words, labels, expected):
    assert positives(words, labels) == expected


@pytest.mark.parametrize(
    ("words", "labels", "says"),
    [
        ("yes,maybe", WORDS, "'maybe', and no sample has it; the labels are background, no, unknown and 2 more"),
        ("!noise", WORDS, "'noise', and no sample has it"),
        ({"yes", "maybe"}, WORDS, "'maybe', and no sample has it"),
        ("10-20", DIGITS, "'10-20', and no sample has it"),
        ("1-9", WORDS, "Ranges such as 1-9 mean whole-number labels"),
        ("9-1", DIGITS, "runs backwards; write 1-9"),
        ("0-9", DIGITS, "every label is positive"),
        ("1,!1", DIGITS, "no label is positive"),
        (lambda label: False, WORDS, "no label is positive"),
        (lambda label: True, WORDS, "every label is positive"),
        ("", WORDS, "No label is named"),
        (",", WORDS, "No label is named"),
        (set(), WORDS, "No label is named"),
        ("!background,unknown", WORDS, "write !background,!unknown"),
        (lambda label: "yes", WORDS, "has to answer True or False; got 'yes' for 'background'"),
        (lambda label: 1 / 0, WORDS, "failed for the label 'background' (ZeroDivisionError: division by zero)"),
        ("yes", ["yes", "", "no"], "1 of 3 samples have no label"),
        ("yes", [], "There are no samples"),
    ],
)
def test_refusals(words, labels, says):
    with pytest.raises(OptionError, match=re.escape(says)):
        omega(words, labels)


def test_it_decides_labels_that_it_was_not_made_with():
    assert omega("!background", WORDS).positive(["new", "background"]).tolist() == [True, False]
    assert omega("yes,no", WORDS).positive(["new", "no"]).tolist() == [False, True]
    assert omega("1-9", DIGITS[:5]).positive(["8", "11"]).tolist() == [True, False]
    assert omega("yes", WORDS).positive([]).tolist() == []
    with pytest.raises(OptionError, match="2 of 3 samples have no label"):
        omega("yes", WORDS).positive(["yes", "", ""])


def test_its_text_and_itself_as_words():
    found = omega("1-9,!5", DIGITS)
    assert str(found) == "1-9,!5"
    assert omega(found, DIGITS) is found
    with pytest.raises(OptionError, match="no sample has it"):
        omega(found, WORDS)
    assert str(omega({"up", "no"}, WORDS)) == "no,up"
    assert isinstance(omega(str.isalpha, ["a", "1"]), Omega)


labels_of_words = st.text("abcxyz 01-.!", min_size=1, max_size=4).map(str.strip).filter(bool)


@given(st.lists(labels_of_words, min_size=2, max_size=12, unique=True), st.data())
def test_a_set_and_its_complement_share_out_the_labels(labels, data):
    chosen = data.draw(st.sets(st.sampled_from(labels), min_size=1, max_size=len(labels) - 1))
    same = {label for label in labels if any(_alike(label, word) for word in chosen)}
    if len(same) == len(labels):
        with pytest.raises(OptionError, match="every label is positive"):
            omega(chosen, labels)
        return
    found = omega(chosen, labels).positive(labels)
    assert {label for label, one in zip(labels, found, strict=True) if one} == same
    rest = omega(lambda label: label not in same, labels).positive(labels)
    assert (found != rest).all()


def _alike(label: str, word: str) -> bool:
    """Equal, or the same whole number written in two ways."""
    numbers = [re.fullmatch(r"0*([0-9]+)(\.0+)?", text) for text in (label, word)]
    return label == word or (all(numbers) and int(numbers[0][1]) == int(numbers[1][1]))


@given(st.lists(st.integers(0, 60), min_size=2, max_size=30), st.integers(0, 60), st.integers(0, 60))
def test_a_range_is_what_lies_between_its_ends(numbers, one, other):
    low, high = sorted((one, other))
    labels = [str(number) for number in numbers]
    inside = [low <= number <= high for number in numbers]
    if all(inside) or not any(inside):
        with pytest.raises(OptionError):
            omega(f"{low}-{high}", labels)
        return
    assert omega(f"{low}-{high}", labels).positive(labels).tolist() == inside
    assert omega(f"!{low}-{high}", labels).positive(labels).tolist() == [not one for one in inside]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20), st.permutations(["yes", "no", "up"]))
def test_order_and_repetition_of_words_do_not_matter(labels, order):
    labels = [*labels, *WORDS]
    expected = [label in ("yes", "no", "up") for label in labels]
    assert omega(",".join(order), labels).positive(labels).tolist() == expected
    assert omega(",".join(order * 2), labels).positive(labels).tolist() == expected


@settings(max_examples=50)
@given(st.text(max_size=20), st.lists(st.text(max_size=5), max_size=6))
def test_any_text_is_a_label_map_or_a_sentence(words, labels):
    try:
        answers = omega(words, labels).positive(labels)
    except OptionError as error:
        message = str(error)
    else:
        message = "none." if answers.any() and not answers.all() else "of one kind only"
    assert message.endswith(".")
    assert len(message) < 400
