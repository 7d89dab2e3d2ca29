"""The pickles of the CIFAR files, read without unpickling (docs/decisions/0008).

A pickle is a program. This reader knows the few instructions that write a dictionary of strings, numbers, lists and
one kind of array; anything else, and any name but those that stand for an array or for bytes, is refused. Nothing is
imported or called: a "call" of numpy's constructor only notes that an array comes.
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from app.domain.errors import DataFault

MAX_STEPS = 20_000_000
_NAMES = frozenset({
    "numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct", "numpy ndarray", "numpy dtype",
    "numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer",  # how protocol 5 writes an array
    "_codecs encode", "__builtin__ bytes",  # how Python 3 writes bytes in protocol 2
})  # fmt: skip
_MARK = object()
_FIXED: dict[int, Callable[[], Any]] = {
    ord("}"): dict, ord("]"): list, ord(")"): tuple, ord("("): lambda: _MARK,
    ord("N"): lambda: None, 0x88: lambda: True, 0x89: lambda: False,
}  # fmt: skip
_NUMBERS = {ord("K"): struct.Struct("<B"), ord("M"): struct.Struct("<H"), ord("J"): struct.Struct("<i")}
_STRINGS = {  # length field, and whether it is text
    ord("U"): (struct.Struct("<B"), False), ord("T"): (struct.Struct("<i"), False),
    ord("C"): (struct.Struct("<B"), False), ord("B"): (struct.Struct("<I"), False),
    0x96: (struct.Struct("<Q"), False), 0x8C: (struct.Struct("<B"), True), ord("X"): (struct.Struct("<I"), True),
}  # fmt: skip
_PUTS = {ord("q"): struct.Struct("<B"), ord("r"): struct.Struct("<I")}
_GETS = {ord("h"): struct.Struct("<B"), ord("j"): struct.Struct("<I")}
_SKIPS = {0x80: 1, 0x95: 8}  # PROTO, FRAME
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class _Name(NamedTuple):
    """A name that the pickle mentions; never looked up."""

    text: str


class _Coming:
    """An array or a dtype between its "call" and its state."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.array: np.ndarray | None = None


class _Bad(Exception):
    pass


def load(data: memoryview, name: str) -> dict[str, Any]:
    """Read one pickle: a dictionary of str, bytes views, int, lists and uint8 arrays (views of `data`).

    Raises `DataFault` with code `unsafe_pickle` for anything else.
    """
    try:
        value = _run(data)
        if not isinstance(value, dict):
            raise _Bad("it holds no dictionary")
        return {_text(key): _finished(item) for key, item in value.items()}
    except (_Bad, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        reason = str(error) if isinstance(error, _Bad) else "it is damaged"
        raise DataFault(
            f"{name} is not a pickle as the CIFAR files have it: {reason}",
            code="unsafe_pickle", phase="read", hint="upload the original cifar-10-python.tar.gz, or an image folder",
        ) from error  # fmt: skip


def _text(key: Any) -> str:
    return key.decode("ascii") if isinstance(key, bytes) else key


def _finished(item: Any) -> Any:
    if isinstance(item, _Coming):
        if item.array is None:
            raise _Bad("an array has no content")
        return item.array
    return item


def _run(data: memoryview) -> Any:
    """Go through the instructions once; there are no jumps, so this ends with the data."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    at = 0
    for _ in range(MAX_STEPS):
        code = data[at]
        at += 1
        if code in _FIXED:
            stack.append(_FIXED[code]())
        elif code in _NUMBERS:
            stack.append(_NUMBERS[code].unpack_from(data, at)[0])
            at += _NUMBERS[code].size
        elif code in _STRINGS:
            field, is_text = _STRINGS[code]
            (length,) = field.unpack_from(data, at)
            at += field.size
            if not 0 <= length <= len(data) - at:
                raise _Bad("a string is longer than the file")
            stack.append(bytes(data[at : at + length]).decode() if is_text else data[at : at + length])
            at += length
        elif code in _PUTS:
            memo[_PUTS[code].unpack_from(data, at)[0]] = stack[-1]
            at += _PUTS[code].size
        elif code == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
        elif code in _GETS:
            stack.append(memo[_GETS[code].unpack_from(data, at)[0]])
            at += _GETS[code].size
        elif code in _SKIPS:
            at += _SKIPS[code]
        elif code == 0x8A:  # LONG1
            stack.append(int.from_bytes(data[at + 1 : at + 1 + data[at]], "little", signed=True))
            at += 1 + data[at]
        elif code == ord("c"):
            module, name, at = _lines(data, at)
            stack.append(_allowed(f"{module} {name}"))
        elif code == 0x93:  # STACK_GLOBAL
            name, module = stack.pop(), stack.pop()
            stack.append(_allowed(f"{module} {name}"))
        elif code in _TUPLES:
            stack[-_TUPLES[code] :] = [tuple(stack[-_TUPLES[code] :])]
        elif code == ord("t"):
            stack.append(tuple(_since_mark(stack)))
        elif code == ord("R"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(_call(called, arguments))
        elif code == ord("b"):
            state = stack.pop()
            _build(stack[-1], state)
        elif code == ord("s"):
            value, key = stack.pop(), stack.pop()
            _dictionary(stack[-1])[_key(key)] = value
        elif code == ord("u"):
            items = _since_mark(stack)
            _dictionary(stack[-1]).update(
                {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}
            )
        elif code == ord("a"):
            value = stack.pop()
            _list(stack[-1]).append(value)
        elif code == ord("e"):
            items = _since_mark(stack)
            _list(stack[-1]).extend(items)
        elif code == ord("."):
            return stack.pop()
        else:
            raise _Bad(f"it has the instruction {chr(code)!r}, which data does not need")
    raise _Bad("it has too many instructions")


def _lines(data: memoryview, at: int) -> tuple[str, str, int]:
    raw = bytes(data[at : at + 200]).split(b"\n", 2)
    if len(raw) < 3:
        raise _Bad("it names something too long")
    return raw[0].decode("ascii", "replace"), raw[1].decode("ascii", "replace"), at + len(raw[0]) + len(raw[1]) + 2


def _allowed(name: str) -> _Name:
    if name not in _NAMES:
        raise _Bad(f"it calls for {name.replace(' ', '.')[:80]!r}, which is code")
    return _Name(name)


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise _Bad("a mark is missing")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _key(key: Any) -> Any:
    return bytes(key) if isinstance(key, memoryview) else _require(key, str)


def _require(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise _Bad("its parts do not fit together")
    return value


def _dictionary(value: Any) -> dict[Any, Any]:
    return _require(value, dict)


def _list(value: Any) -> list[Any]:
    return _require(value, list)


def _call(called: Any, arguments: Any) -> Any:
    """Give what a call would have made: always bytes, or an array or dtype that waits for its state."""
    if not isinstance(called, _Name) or not isinstance(arguments, tuple):
        raise _Bad("it calls something that is no name")
    match called.text, arguments:
        case "_codecs encode", (str() as text, coding) if _plain(coding) == "latin1":
            return memoryview(text.encode("latin-1"))
        case "__builtin__ bytes", ():
            return memoryview(b"")
        case "numpy dtype", (kind, *_) if _plain(kind) == "u1":
            return _Coming("dtype")
        case _, (_Name("numpy ndarray"), *_) if called.text.endswith("_reconstruct"):
            return _Coming("array")
        case _, (memoryview() as raw, dtype, shape, order) if called.text.endswith("_frombuffer"):
            coming = _Coming("array")
            _build(coming, (1, shape, dtype, _plain(order) == "F", raw))
            return coming
        case _:
            raise _Bad("it holds an array of another type than uint8")


def _plain(value: Any) -> str | None:
    return bytes(value).decode("ascii", "replace") if isinstance(value, memoryview) else value


def _build(target: Any, state: Any) -> None:
    _require(target, _Coming)
    if target.kind == "dtype":
        return
    _, shape, dtype, fortran, raw = _require(state, tuple)
    if not isinstance(dtype, _Coming) or dtype.kind != "dtype" or not isinstance(raw, memoryview):
        raise _Bad("it holds an array of another type than uint8")
    if not isinstance(shape, tuple) or not 1 <= len(shape) <= 4 or any(type(n) is not int or n < 0 for n in shape):
        raise _Bad("it holds an array without a shape")
    size = 1
    for n in shape:
        size *= n
    if size != len(raw):
        raise _Bad(f"an array of shape {shape} has {len(raw)} bytes")
    target.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
