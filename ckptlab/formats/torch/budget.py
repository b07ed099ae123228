"""What a pickle may cost, counted before it is unpickled: a few bytes can ask for any amount of memory or time.

One pass over the opcodes, which makes nothing. torch's own files need some forty opcodes a tensor, number what they
remember from 0 on, and never use DUP.
"""

from __future__ import annotations

import pickletools
import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from ckptlab.errors import UnsafeFileError

PICKLE_BYTES = 1 << 28
OPCODES = 20_000_000
OBJECTS = 2_000_000  # lists, tuples, dicts, sets, marks
CALLS = 1_500_000  # what is made by a call or of a class
GLOBALS = 4_000  # different names of classes and functions
# numbers that have the hash of another: as keys, those of one hash cost the square of their number
LONG_NUMBERS = 10_000
FROZENSETS = 2_000  # of which small integers make any number of one hash
_SMALL = 1 << 15  # bytes of a pickle that is worth being remembered
SHARED_TUPLES = 20  # references to tuples from which on it is looked how many one unfolds to

_LENGTHS = {"U": "B", "X": "<I", "T": "<i", "B": "<I", "C": "B"}
_LENGTHS |= {"\x8a": "B", "\x8b": "<i", "\x8c": "B", "\x8d": "<Q", "\x8e": "<Q", "\x96": "<Q"}
_LINES = {"I": 1, "L": 1, "S": 1, "V": 1, "F": 1, "c": 2, "i": 2, "P": 1, "g": 1, "p": 1}
_CONTAINERS, _CALLS, _TUPLES = b"}](ldt)\x8f\x91\x85\x86\x87", b"Ro\x81\x92bi", b"t\x85\x86\x87"
_MAKES = b"}](ldt)\x8f\x91\x85\x86\x87Ro\x81\x92icNQPKMJGIFLSVUXTBC\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x96"  # not: POP, …
_KNOWN = {ord(op.code): op for op in pickletools.opcodes}
_SPECIAL = {ord(code) for code in (*_LENGTHS, *_LINES, *"qrhjG", "\x94", "2", ".")}
# bytes of an opcode of fixed size that needs no look, its argument included; 0 for all others
_PLAIN = [
    0 if op is None or i in _SPECIAL else 1 if op.arg is None else 1 + max(op.arg.n, -1)
    for i, op in enumerate(map(_KNOWN.get, range(256)))
]
# whether what is remembered after an opcode may be a tuple: one was made, or none can say what lies on top
# (numbers, which no pickler remembers, are treated alike: many tuples of them may have one hash)
_MAY_BE_TUPLE = [i in _TUPLES + b"JKMGIFL\x8a\x8b" or i not in _MAKES for i in range(256)]
_MAY_BE_ALIKE = [may or i in b"R\x81\x92" for i, may in enumerate(_MAY_BE_TUPLE)]  # where numbers of one hash occur
# -1 and -2 have one hash, as integers and as floats: so do tuples of them
_MINUS_ONE = (b"J\xff\xff\xff\xff", b"G\xbf\xf0\0\0\0\0\0\0", b"I-1\n", b"L-1", b"F-1")
_MINUS_TWO = (b"J\xfe\xff\xff\xff", b"G\xc0\0\0\0\0\0\0\0", b"I-2\n", b"L-2", b"F-2")
_BINPUT, _BINGET, _BINUNICODE = b"qhX"
_BUILD = ord("b")
_GETS, _EMPTY_TUPLE = b"hj", ord(")")  # with which a record begins


@dataclass(frozen=True)
class Budget:
    """How much of each a pickle may have."""

    containers: int = OBJECTS
    calls: int = CALLS


def _string(code: bytes, size: str) -> bytes:
    """Strings of up to 48 bytes, each with its length before it, as a regular expression."""
    lengths = (re.escape(struct.pack(size, n)) + rb"[\0-\x7f]{%d}" % n for n in range(49))
    return re.escape(code) + rb"(?:" + rb"|".join(lengths) + rb")"


# In all of them no argument has the byte 0x94, so that each is a MEMOIZE.
_GET = rb"(?:h[^\x94]|j[^\x94]{4})"
_NUMBER = rb"(?:K[^\x94]|M[^\x94]{2}|J[^\x94]{4}|\x8a\x05[^\x94]{5})"
_SIZE = _GET + rb"(?:" + _NUMBER + rb"{1,3}[\x85-\x87]|\(" + _NUMBER + rb"{0,32}t)\x94?\x85\x94?R\x94?"
_TEXT = rb"(?:" + _string(b"\x8c", "B") + rb"|" + _string(b"X", "<I") + rb")\x94?"
_VALUE = rb"(?:" + rb"|".join((_SIZE, _GET, _NUMBER, _TEXT, rb"N")) + rb")"
_RECORDS = re.compile(rb"(?:" + _GET + rb"\)\x81\x94?\}\x94?\((?:" + _GET + _VALUE + rb")+ubs?){1,1000}")
"""Objects made by `__new__` whose attributes are numbers, strings, sizes and what is remembered: no tuple in one holds
what is remembered, and so none unfolds."""


def examine(data: bytes, most: Budget = Budget()) -> bool:
    """Whether a pickle has so many references to tuples that a few of them may unfold to more than can be hashed, or
    that many of them may have one hash.

    UnsafeFileError where it is over a budget; a pickle that is cut or no pickle is left to the unpickler.
    """
    return (_examined_before if len(data) <= _SMALL else _examined)(data, most)


@lru_cache(maxsize=256)
def _examined_before(data: bytes, most: Budget) -> bool:
    """Many ranks write the same pickle: tensor parallel ones, say, whose tensors have the same shapes and names."""
    return _examined(data, most)


def _examined(data: bytes, most: Budget) -> bool:
    position = 0
    opcodes, inside = bytearray(), bytearray()
    alike = sum(map(data.count, _MINUS_ONE))
    alike = min(alike, sum(map(data.count, _MINUS_TWO))) if alike else 0
    append, plain, may_be_tuple = opcodes.append, _PLAIN, _MAY_BE_ALIKE if alike else _MAY_BE_TUPLE
    put = shared = numbers = last = 0
    tuples: set[int] = set()
    try:
        while True:
            op = data[position]
            append(op)
            if size := plain[op]:
                position += size
                last = op
                continue
            if op == _BINPUT:
                put += 1
                if may_be_tuple[last]:
                    tuples.add(data[position + 1])
                position += 2
                last = op
                continue
            if op in _GETS and data[position + (2 if op == _BINGET else 5)] == _EMPTY_TUPLE:
                record = _RECORDS.match(data, position)
                if record is not None:
                    inside += record[0]  # with arguments: a few too many are counted
                    put += record[0].count(b"\x94")
                    position, last = record.end(), _BUILD
                    continue
            if op == _BINGET:
                shared += data[position + 1] in tuples
                position += 2
                last = op
                continue
            if op == _BINUNICODE:
                position += 5 + int.from_bytes(data[position + 1 : position + 5], "little")
                last = op
                continue
            if op not in _SPECIAL or op == 46:  # no opcode, or STOP
                break
            code = chr(op)
            if code in "rp\x94":
                if code == "p":
                    line = data.index(b"\n", position)
                    index, position = int(data[position + 1 : line]), line + 1
                elif op == 0x94:
                    index, position = put, position + 1
                else:
                    index, position = int.from_bytes(data[position + 1 : position + 5], "little"), position + 5
                put += 1
                if index > 2 * put + 1000:
                    raise _over(f"it remembers object {index:,} after {put:,}")
                if may_be_tuple[last]:
                    tuples.add(index)
            elif code in "jg":
                if code == "g":
                    line = data.index(b"\n", position)
                    index, position = int(data[position + 1 : line]), line + 1
                else:
                    index, position = int.from_bytes(data[position + 1 : position + 5], "little"), position + 5
                shared += index in tuples
            elif code == "G":
                exponent = (data[position + 1] & 0x7F) << 4 | data[position + 2] >> 4
                numbers += not 1023 - 30 <= exponent <= 1023 + 30 and exponent > 0
                position += 9
            elif code == "2":
                raise _over("it doubles objects (DUP)")
            elif code in _LINES:
                for _ in range(_LINES[code]):
                    position = data.index(b"\n", position) + 1
                numbers += code in "IL"
            else:
                (size,) = struct.unpack_from(_LENGTHS[code], data, position + 1)
                position += 1 + struct.calcsize(_LENGTHS[code]) + max(size, 0)
                if op in (0x8A, 0x8B) and (size >= 8 or (0 < size < 4 and data[position - 1] >= 0x80)):
                    numbers += 1
                    may_be_tuple = _MAY_BE_ALIKE
            last = op
    except (ValueError, struct.error, IndexError):
        pass
    _count("opcodes", len(opcodes), OPCODES)
    _count("containers", sum(map(opcodes.count, _CONTAINERS)) + sum(map(inside.count, _CONTAINERS)), most.containers)
    _count("calls", sum(map(opcodes.count, _CALLS)) + sum(map(inside.count, _CALLS)), most.calls)
    _count("numbers that have the hash of others", numbers + alike, LONG_NUMBERS)
    _count("frozensets", opcodes.count(b"\x91"), FROZENSETS)
    return shared > SHARED_TUPLES


def _count(what: str, found: int, most: int) -> None:
    if found > most:
        raise _over(f"it has {found:,} {what}, more than {most:,}")


def _over(what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"its pickle would cost too much memory or time: {what}, as no checkpoint does; do not use it"
    )
