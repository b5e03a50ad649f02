"""Arrays come back from bytes: exactly or within the stated rounding, in as many bytes as the format says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dslify.errors import ExportError, OptionError
from dslify.runtime import wire

FLOATS = st.floats(-1e4, 1e4, width=32).map(lambda x: 0.0 if abs(x) < 0.5 else x)
EXACT = ("int64", "int32", "int16", "int8", "uint8", "uint32", "bool", "complex64")
SHAPES = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7)


def there_and_back(value: np.ndarray, number: str = "fp16", rows: tuple[int, ...] = ()) -> np.ndarray:
    (found,) = wire.decode(wire.encode([value], number, [rows]))
    assert found.dtype == value.dtype
    assert found.shape == value.shape
    return found


@st.composite
def tables(draw: st.DrawFn, dtype: str = "float32") -> tuple[np.ndarray, tuple[int, ...]]:
    """An array with channels that are zero, and its row axes."""
    value = draw(arrays(dtype, SHAPES, elements=FLOATS))
    axes = tuple(sorted(draw(st.sets(st.integers(0, value.ndim - 1))))) if value.ndim else ()
    if value.ndim:
        axis = draw(st.integers(0, value.ndim - 1))
        kept = draw(arrays("bool", value.shape[axis]))
        value = value * kept.reshape([-1 if at == axis else 1 for at in range(value.ndim)]).astype(dtype)
    return value, axes


def rows_of(value: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    first = np.moveaxis(value, axes, range(len(axes)))
    rows = math.prod(first.shape[: len(axes)])
    return first.reshape(rows, math.prod(first.shape[len(axes) :]))


@settings(max_examples=60, deadline=None)
@given(tables())
def test_fp32_comes_back_exactly_in_as_many_bytes_as_the_shortest_of_four_codings(made):
    value, axes = made
    assert np.array_equal(there_and_back(value, "fp32", axes), value)
    table = rows_of(value, axes)
    rows, entries = table.shape
    kept, there = int((table != 0).any(1).sum()), int(np.count_nonzero(table))
    bodies = (
        4 * rows * entries,
        math.ceil(rows / 8) + 4 * kept * entries,
        math.ceil(rows * entries / 8) + 4 * there,
        math.ceil(rows / 8) + math.ceil(kept * entries / 8) + 4 * there,
    )
    assert len(wire.encode([value], "fp32", [axes])) == 4 + 5 + 4 * value.ndim + min(bodies)


@settings(max_examples=60, deadline=None)
@given(tables())
def test_fp16_is_off_by_at_most_its_rounding(made):
    value, axes = made
    found = there_and_back(value, "fp16", axes)
    assert (np.abs(found - value) <= np.abs(value) * 2.0**-11 + 2.0**-25).all()
    assert len(wire.encode([value], "fp16", [axes])) <= len(wire.encode([value], "fp32", [axes]))


@settings(max_examples=60, deadline=None)
@given(tables(), st.sampled_from(["float32", "float64", "float16"]))
def test_int8_is_off_by_at_most_half_a_step_of_its_row(made, dtype):
    value, axes = made
    value = value.astype(dtype)
    found = there_and_back(value, "int8", axes).astype(np.float64)
    table = rows_of(value.astype(np.float64), axes)
    largest = np.abs(table).max(1, initial=0.0)[:, None]
    rounding = 2.0**-11 if dtype == "float16" else 1e-6  # of the values as their own type holds them
    assert (np.abs(rows_of(found, axes) - table) <= largest * (1 / 254 + rounding)).all()
    assert len(wire.encode([value], "int8", [axes])) <= len(wire.encode([value], "fp16", [axes]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(EXACT), st.sampled_from(wire.NUMBERS))
def test_whole_numbers_and_booleans_come_back_exactly(data, dtype, number):
    value = data.draw(arrays(dtype, SHAPES))
    axes = tuple(range(value.ndim))[: data.draw(st.integers(0, 4))]
    assert np.array_equal(there_and_back(value, number, axes), value, equal_nan=dtype == "complex64")


def test_a_boolean_takes_one_bit():
    assert len(wire.encode([np.ones((4, 100), bool)])) == 4 + 5 + 8 + 50


@pytest.mark.parametrize("number", wire.NUMBERS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (0, 5), (1,), (2, 3, 4)])
def test_zeros_take_a_bitmap_and_come_back(number, shape):
    value = np.zeros(shape, np.float32)
    axes = tuple(range(min(2, len(shape))))
    assert not there_and_back(value, number, axes).any()
    rows = math.prod(shape[:2])
    assert len(wire.encode([value], number, [axes])) <= 4 + 5 + 4 * len(shape) + math.ceil(rows / 8)


def test_half_of_the_channels_zero_takes_a_quarter_of_dense_fp32():
    value = np.random.default_rng(0).standard_normal((1, 64, 100)).astype(np.float32)
    value[:, ::2] = 0
    head = 4 + 5 + 12
    assert len(wire.encode([value], "fp16", [(0, 1)])) == head + 8 + 32 * 100 * 2
    assert len(wire.encode([value], "int8", [(0, 1)])) == head + 8 + 32 * (4 + 100)
    assert wire.dense_bytes([value]) == 25600
    assert wire.dense_bytes([value, np.zeros(3, np.int64)], 1) == 6400 + 24


def test_scattered_zeros_take_a_bitmap_of_values():
    value = np.random.default_rng(0).standard_normal((1, 64, 100)).astype(np.float32)
    value[np.abs(value) < 1] = 0
    there = np.count_nonzero(value)
    assert len(wire.encode([value], "fp16", [(0, 1)])) == 4 + 5 + 12 + 800 + 2 * there


@pytest.mark.parametrize(
    ("values", "number", "sent"),
    [
        ([1.0, 65504.0], "fp16", "fp16"),
        ([1.0, 65520.0], "fp16", "exact"),  # float32's own
        ([1e-6, 1e-5], "fp16", "exact"),  # all below the normal numbers of fp16
        ([1e-6, 1.0], "fp16", "fp16"),
        ([np.inf, 1.0], "fp16", "fp16"),
        ([np.nan, 1e5], "fp16", "exact"),
        ([np.nan] + [1.0] * 9, "int8", "fp16"),
        ([np.inf, 1e6] + [1.0] * 9, "int8", "exact"),
        ([1e6] * 10, "int8", "int8"),
        ([1e-44] * 10, "int8", "exact"),
        ([1.0], "int8", "fp16"),  # the scale would cost more
    ],
)
def test_numbers_outside_the_range_go_as_the_next_that_holds_them(values, number, sent):
    value = np.array(values, np.float32)
    message = wire.encode([value], number)
    assert wire.numbers_of(message) == (sent,)
    assert np.allclose(wire.decode(message)[0], value, rtol=2e-2, atol=0, equal_nan=True)


def test_a_float64_goes_as_fp32_only_where_that_holds_it():
    for top, sent in ((1e5, "fp32"), (1e300, "exact")):
        message = wire.encode([np.array([1.0, top])], "fp16")
        assert wire.numbers_of(message) == (sent,)
        assert np.array_equal(wire.decode(message)[0], [1.0, top])


def test_several_values_of_other_types_in_one_message():
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((2, 3)), np.arange(5), np.array(True), np.zeros((2, 0), np.float32), np.float32(7)]
    found = wire.decode(wire.encode(values, "fp32", [(0, 1)]))
    assert len(found) == 5
    for mine, theirs in zip(found, values, strict=True):
        assert np.allclose(mine, theirs, rtol=1e-7)
        assert mine.dtype == np.asarray(theirs).dtype


def test_rows_that_are_no_neighbours_in_memory():
    value = np.random.default_rng(0).standard_normal((3, 5, 4, 6)).astype(np.float32)
    value[:, :, 1] = 0
    for axes in ((2,), (0, 2), (2, 3), (1, 3), (3, 0)):
        assert np.array_equal(there_and_back(value, "fp32", axes), value)


def test_messages_that_are_none_or_cut_short_are_told():
    message = wire.encode([np.arange(12, dtype=np.float32).reshape(3, 4)], "fp16", [(0,)])
    with pytest.raises(ExportError, match="no message"):
        wire.decode(b"PK" + message[2:])
    with pytest.raises(ExportError, match="version 9"):
        wire.decode(message[:2] + b"\x09" + message[3:])
    with pytest.raises(ExportError, match="bytes too many"):
        wire.decode(message + b"\0")
    for length in range(4, len(message)):
        with pytest.raises(ExportError, match="damaged"):
            wire.decode(message[:length])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_message_never_ends_in_another_error(data):
    message = bytearray(wire.encode([np.eye(6, 9, dtype=np.float32), np.arange(3)], "int8", [(0,)]))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] = data.draw(st.integers(0, 255))
    try:
        wire.decode(bytes(message))
    except ExportError as error:
        assert str(error).endswith((".", "again."))  # noqa: PT017


def test_what_cannot_be_sent_is_told():
    with pytest.raises(OptionError, match="one of fp32, fp16, int8; got 'fp8'"):
        wire.encode([np.zeros(3, np.float32)], "fp8")
    with pytest.raises(OptionError, match="type object"):
        wire.encode([np.array([None])])
    with pytest.raises(OptionError, match="Row axes"):
        wire.encode([np.zeros(3, np.float32)], "fp16", [(1,)])
    with pytest.raises(OptionError, match="at most 255"):
        wire.encode([np.zeros(1, np.float32)] * 256)
