"""Arrays as the bytes that go from the processor with front and light to the one with full.

    message = "DS" version:u8 count:u8 value*
    value   = type:u8 number:u8 coding:u8 row_axes:u8 axes:u8 size:u32*axes body
    body    = [bitmap of rows] [bitmap of entries] [scale:f32 per row, for int8] numbers

All little-endian. A value is a table for its body: one row for each index along its row axes (samples and channels),
the rest of it in order. coding, bit 0: rows that are all zero are left out, and a bitmap says which. bit 1: entries
that are zero are left out, and a bitmap over the rows that are left says which. Of the four the shortest is sent. What
is left out comes back as zero, a negative zero included.

Floating-point numbers go as fp32, fp16 (the default) or int8 with a scale per row, each value in the first of these
that holds it, beginning with the one asked for:
    int8   off by at most 1/254 of the row's largest magnitude; not where there are infinities or NaN, or where its
           scales cost what it saves
    fp16   off by at most 2**-11 of the number, or 2**-25 below 2**-14; where the largest magnitude is from 2**-14 to
           65504
    fp32   exact for float32; where a float64 lies in its range
    exact  the value's own type
Whole numbers, booleans (a bitmap) and complex numbers come back exactly.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import ExportError, OptionError

VERSION = 1
NUMBERS = ("fp32", "fp16", "int8")
TYPES = (
    "float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
    "complex64", "complex128",
)  # fmt: skip
_MAGIC = b"DS"
_EXACT, _FP32, _FP16, _INT8, _BITS = range(5)
_AS: dict[int, np.dtype[Any]] = {_FP32: np.dtype("<f4"), _FP16: np.dtype("<f2"), _INT8: np.dtype("i1")}
_ROWS, _ENTRIES = 1, 2  # bits of the coding
_SCALE = 4  # bytes
_STEPS = 127  # of int8 on either side of zero
_HEAD, _VALUE = 4, 5  # bytes of the message's head, and of a value's without its sizes


def encode(values: Sequence[np.ndarray], number: str = "fp16", rows: Sequence[Sequence[int]] = ()) -> bytes:
    """The values as one message.

    rows: the row axes of each value, out of its first eight; none for those that are not named. Raises OptionError for
    another number or an array of another type.
    """
    if number not in NUMBERS:
        raise OptionError(f"Numbers on the wire are one of {', '.join(NUMBERS)}; got {number!r}.")
    if len(values) > 255:
        raise OptionError(f"A message holds at most 255 values; got {len(values)}.")
    parts = [_MAGIC, bytes((VERSION, len(values)))]
    for value, axes in zip_longest(values, rows[: len(values)], fillvalue=()):
        parts += _encoded(np.asarray(value), number, tuple(axes))
    return b"".join(parts)


def decode(message: bytes) -> tuple[np.ndarray, ...]:
    """The values of a message. Raises ExportError for one that is damaged, or of another version."""
    if message[:2] != _MAGIC or len(message) < _HEAD:
        raise ExportError("These bytes are no message of dslify.runtime.wire; give what encode() made.")
    if message[2] != VERSION:
        raise ExportError(f"The message is of version {message[2]}, and this dslify reads version {VERSION}.")
    reader = _Reader(message, _HEAD)
    try:
        values = tuple(_decoded(reader) for _ in range(message[3]))
    except (ValueError, OverflowError, MemoryError) as error:
        raise ExportError(f"The message between the parts is damaged ({error}); send it again.") from None
    if reader.at != len(message):
        raise ExportError(
            f"The message between the parts has {len(message) - reader.at} bytes too many; send it again."
        )
    return values


def dense_bytes(values: Iterable[np.ndarray], each: int = 4) -> int:
    """Bytes of the plain arrays, with `each` bytes for a floating-point number and others as they are."""
    return sum(value.size * (each if value.dtype.kind == "f" else value.itemsize) for value in values)


def numbers_of(message: bytes) -> tuple[str, ...]:
    """How each value of a message was sent: "exact", one of NUMBERS, or "bits"."""
    reader, found = _Reader(message, _HEAD), []
    for _ in range(message[3]):
        found.append(("exact", *NUMBERS, "bits")[message[reader.at + 1]])
        _decoded(reader)
    return tuple(found)


def _encoded(value: np.ndarray, number: str, row_axes: tuple[int, ...]) -> list[bytes]:
    if value.dtype.name not in TYPES:
        raise OptionError(f"An array of type {value.dtype} cannot be sent; expected one of {', '.join(TYPES)}.")
    if value.ndim > 255 or any(axis not in range(min(value.ndim, 8)) for axis in row_axes):
        raise OptionError(f"Row axes lie among the first eight of an array; got {row_axes} for {value.ndim} axes.")
    table = _table(value, row_axes)
    there = table != 0
    kept = there.any(1)
    kind, coding = min(
        ((kind, coding) for kind in _possible(table, there, number) for coding in range(4) if _can(kind, coding)),
        key=lambda way: _size(way[0], way[1], table, int(kept.sum()), int(there.sum())),
    )
    mask = sum(1 << axis for axis in row_axes)
    head = struct.pack(
        f"<BBBBB{value.ndim}I", TYPES.index(value.dtype.name), kind, coding, mask, value.ndim, *value.shape
    )
    parts = [head]
    if coding & _ROWS:
        parts.append(np.packbits(kept).tobytes())
        table, there = table[kept], there[kept]
    if coding & _ENTRIES:
        parts.append(np.packbits(there).tobytes())
    if kind == _INT8:
        scales = _scales(table)
        parts.append(scales.tobytes())
        table = np.rint(table / np.where(scales, scales, 1)[:, None])
    if kind != _BITS:
        sent = table[there] if coding & _ENTRIES else table
        parts.append(sent.astype(_AS.get(kind, sent.dtype.newbyteorder("<"))).tobytes())
    return parts


def _decoded(reader: _Reader) -> np.ndarray:
    code, kind, coding, mask, axes = reader.array(np.dtype("u1"), _VALUE).tolist()
    shape = tuple(reader.array(np.dtype("<u4"), axes).tolist())
    if code >= len(TYPES) or kind > _BITS or coding > _ROWS + _ENTRIES or not _can(kind, coding):
        raise ValueError("a value's head makes no sense")
    kept_type = np.dtype(TYPES[code])
    row_axes = tuple(axis for axis in range(min(axes, 8)) if mask >> axis & 1)
    first = [shape[axis] for axis in row_axes]
    rest = [size for axis, size in enumerate(shape) if axis not in row_axes]
    rows, entries = math.prod(first), math.prod(rest)
    kept = reader.bits(rows) if coding & _ROWS else None
    left = rows if kept is None else int(kept.sum())
    there = reader.bits(left * entries).reshape(left, entries) if coding & _ENTRIES else None
    scales = reader.array(np.dtype("<f4"), left) if kind == _INT8 else None
    count = left * entries if there is None else int(there.sum())
    if kind == _BITS:
        numbers = np.ones(count, kept_type)
    else:
        numbers = reader.array(_AS.get(kind, kept_type.newbyteorder("<")), count)
    if there is not None:
        found = np.zeros((left, entries), numbers.dtype)
        found[there] = numbers
    else:
        found = numbers.reshape(left, entries)
    if scales is not None:
        found = found * scales[:, None]
    table = found.astype(kept_type)
    if kept is not None:
        table = np.zeros((rows, entries), kept_type)
        table[kept] = found
    return np.ascontiguousarray(np.moveaxis(table.reshape((*first, *rest)), range(len(first)), row_axes)).reshape(shape)


class _Reader:
    def __init__(self, message: bytes, at: int):
        self.message, self.at = message, at

    def array(self, kind: np.dtype, count: int) -> np.ndarray:
        found = np.frombuffer(self.message, kind, count, self.at) if count else np.empty(0, kind)
        self.at += found.nbytes
        return found

    def bits(self, count: int) -> np.ndarray:
        return np.unpackbits(self.array(np.dtype("u1"), -(-count // 8)), count=count).astype(bool)


def _table(value: np.ndarray, row_axes: tuple[int, ...]) -> np.ndarray:
    ahead = sorted(row_axes)
    rows = math.prod(value.shape[axis] for axis in ahead)
    entries = math.prod(size for axis, size in enumerate(value.shape) if axis not in ahead)
    return np.moveaxis(value, ahead, range(len(ahead))).reshape(rows, entries)


def _can(kind: int, coding: int) -> bool:
    """Bits are nothing but a bitmap of entries."""
    return kind != _BITS or bool(coding & _ENTRIES)


def _size(kind: int, coding: int, table: np.ndarray, kept: int, there: int) -> int:
    """Bytes of a body. kept: rows with a number in them. there: entries that are not zero."""
    rows, entries = table.shape
    left = kept if coding & _ROWS else rows
    bitmaps = (-(-rows // 8) if coding & _ROWS else 0) + (-(-left * entries // 8) if coding & _ENTRIES else 0)
    count = there if coding & _ENTRIES else left * entries
    each = 0 if kind == _BITS else _AS.get(kind, table.dtype).itemsize
    return bitmaps + count * each + (left * _SCALE if kind == _INT8 else 0)


def _possible(table: np.ndarray, there: np.ndarray, number: str) -> tuple[int, ...]:
    """The numbers that a value may go as, the more exact one first where both cost the same."""
    if table.dtype.kind == "b":
        return (_BITS,)
    if table.dtype.kind != "f":
        return (_EXACT,)
    magnitudes = np.abs(table)
    top = float(magnitudes.max(initial=0.0))
    if finite := math.isfinite(top):
        largest = magnitudes.max(1, initial=0.0)[there.any(1)]
    else:
        top = float(magnitudes.max(initial=0.0, where=np.isfinite(magnitudes)))
    plain = _EXACT
    if table.dtype.itemsize > 4 and _within(top, np.float32):
        plain = _FP32
    if number != "fp32" and table.dtype.itemsize > 2 and _within(top, np.float16):
        plain = _FP16
    if number == "int8" and finite and all(_within(float(most) / _STEPS, np.float32) for most in _ends(largest)):
        return (plain, _INT8)
    return (plain,)


def _within(top: float, kind: type[np.floating]) -> bool:
    """Whether numbers up to `top` lie in the normal range of a type. Zeros do."""
    return top == 0 or float(np.finfo(kind).smallest_normal) <= top <= float(np.finfo(kind).max)


def _ends(values: np.ndarray) -> tuple[float, ...]:
    return (values.min(), values.max()) if values.size else ()


def _scales(table: np.ndarray) -> np.ndarray:
    return (np.abs(table, dtype=np.float64).max(1, initial=0.0) / _STEPS).astype("<f4")
