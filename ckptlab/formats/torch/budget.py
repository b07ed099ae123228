"""What a pickle may cost, counted before it is unpickled: a few bytes can ask for any amount of memory or time.

One pass over the opcodes, which makes nothing. torch's own files need some forty opcodes a tensor, number what they
remember from 0 on, and never use DUP.
"""

from __future__ import annotations

import pickletools
import struct

from ckptlab.errors import UnsafeFileError

PICKLE_BYTES = 1 << 28
OPCODES = 20_000_000
OBJECTS = 4_000_000  # lists, tuples, dicts, sets, marks
CALLS = 1_500_000  # what is made by a call or of a class
GLOBALS = 4_000  # different names of classes and functions
LONG_NUMBERS = 10_000  # integers of 8 bytes and more: as keys, those of one hash cost the square of their number
SHARED_TUPLES = 20  # references to tuples from which on it is looked how many one unfolds to

_LENGTHS = {"U": "B", "X": "<I", "T": "<i", "B": "<I", "C": "B"}
_LENGTHS |= {"\x8a": "B", "\x8b": "<i", "\x8c": "B", "\x8d": "<Q", "\x8e": "<Q", "\x96": "<Q"}
_LINES = {"I": 1, "L": 1, "S": 1, "V": 1, "F": 1, "c": 2, "i": 2, "P": 1, "g": 1, "p": 1}
_CONTAINERS, _CALLS, _TUPLES = b"}](ldt)\x8f\x91\x85\x86\x87", b"Ro\x81\x92bi", b"t\x85\x86\x87"
_KNOWN = {ord(op.code): op for op in pickletools.opcodes}
_FIXED = [
    op.arg.n if (op := _KNOWN.get(i)) and op.arg and op.arg.n >= 0 else 0 if op and op.arg is None else -1
    for i in range(256)
]
_SPECIAL = {ord(code) for code in (*_LENGTHS, *_LINES, *"qrhj", "\x94", "2")}


def examine(data: bytes) -> bool:
    """Whether a pickle has so many references to tuples that a few of them may unfold to more than can be hashed.

    UnsafeFileError where it is over a budget; a pickle that is cut or no pickle is left to the unpickler.
    """
    position, end = 0, len(data)
    opcodes = bytearray()
    append, fixed, special = opcodes.append, _FIXED, _SPECIAL
    put = shared = numbers = last = 0
    tuples: set[int] = set()
    try:
        while position < end:
            op = data[position]
            append(op)
            if op not in special:
                if op == 46 or fixed[op] < 0:  # STOP, or no opcode
                    break
                position += 1 + fixed[op]
                last = op
                continue
            code = chr(op)
            if code in "qr" or op == 0x94 or code == "p":
                if code == "p":
                    line = data.index(b"\n", position)
                    index, position = int(data[position + 1 : line]), line + 1
                elif op == 0x94:
                    index, position = put, position + 1
                else:
                    size = 1 if code == "q" else 4
                    index = int.from_bytes(data[position + 1 : position + 1 + size], "little")
                    position += 1 + size
                put += 1
                if index > 2 * put + 1000:
                    raise _over(f"it remembers object {index:,} after {put:,}")
                if last in _TUPLES or last not in _MAKES:
                    tuples.add(index)
            elif code in "hjg":
                if code == "g":
                    line = data.index(b"\n", position)
                    index, position = int(data[position + 1 : line]), line + 1
                else:
                    size = 1 if code == "h" else 4
                    index = int.from_bytes(data[position + 1 : position + 1 + size], "little")
                    position += 1 + size
                shared += index in tuples
            elif code == "2":
                raise _over("it doubles objects (DUP)")
            elif code in _LINES:
                for _ in range(_LINES[code]):
                    position = data.index(b"\n", position) + 1
                numbers += code in "IL"
            else:
                (size,) = struct.unpack_from(_LENGTHS[code], data, position + 1)
                position += 1 + struct.calcsize(_LENGTHS[code]) + max(size, 0)
                numbers += op in (0x8A, 0x8B) and size >= 8
            last = op
    except (ValueError, struct.error, IndexError):
        pass
    _count("opcodes", len(opcodes), OPCODES)
    _count("containers", sum(map(opcodes.count, _CONTAINERS)), OBJECTS)
    _count("calls", sum(map(opcodes.count, _CALLS)), CALLS)
    _count("long numbers", numbers, LONG_NUMBERS)
    return shared > SHARED_TUPLES


_MAKES = b"}](ldt)\x8f\x91\x85\x86\x87Ro\x81\x92icNQPKMJGIFLSVUXTBC\x88\x89\x8a\x8b\x8c\x8d\x8e\x93\x96"  # not: POP, …


def _count(what: str, found: int, most: int) -> None:
    if found > most:
        raise _over(f"it has {found:,} {what}, more than {most:,}")


def _over(what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"its pickle would cost too much memory or time: {what}, as no checkpoint does; do not use it"
    )
