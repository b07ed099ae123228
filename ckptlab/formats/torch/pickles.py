"""Pickles without importing or calling anything that they name.

Reading turns every global into a `Global` (a name) and everything made from one into a `Foreign` (a
record of how it was made), save a few plain values such as OrderedDict and set. Writing turns both back
into what they were read from, so that a file can be rewritten without the classes that it names.
The opcodes are described in Python's `pickletools`.
"""

import codecs
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any, BinaryIO, ClassVar

from ckptlab.errors import CheckpointError, CkptlabError, UnsafeFileError
from ckptlab.formats.torch import budget
from ckptlab.formats.torch.placeholders import Foreign, Global, comparisons_at_most, foreign, named
from ckptlab.words import brief, shorten

__all__ = [
    "PLAIN_VALUES",
    "Foreign",
    "Global",
    "Pickler",
    "Size",
    "Unpickler",
    "dumps",
    "foreign",
    "loads",
    "named",
]

# A tuple's hash recurses in C without a check: used as a key, one 100,000 deep fits in a stack of 8 MiB, one
# 150,000 deep ends the process.
DEEPEST_TUPLE = 50_000
LARGEST_TUPLE = 10_000_000
COMPARISONS = 2_000_000  # of placeholders in the place of keys, those that are alike on their surface
ALIKE = 2_000  # different tuples of one hash
MEASURED = 1_000  # elements of a tuple, those of tuples in it included, up to which its hash is looked at

# Their opcodes' methods are no documented interface, and are missing from the type stubs.
_PythonPickler: Any = pickle._Pickler
_PythonUnpickler: Any = pickle._Unpickler


class Size(tuple[int, ...]):
    """A `torch.Size`: a tuple that is written as one again."""

    __slots__ = ()


def _size(*args: Any) -> Any:
    fits = len(args) == 1 and type(args[0]) in (tuple, list) and all(type(size) is int for size in args[0])
    return Size(args[0]) if fits else NotImplemented


def _ordered_dict(*args: Any) -> Any:
    return OrderedDict() if args == () else NotImplemented


def _from_list(kind: type) -> Callable[..., Any]:
    """Sets, which are pickled as one list; only of that: some iterables are too long to be gone through."""
    return lambda *args: kind(*args) if len(args) == 1 and type(args[0]) is list else NotImplemented


def _from_numbers(kind: type) -> Callable[..., Any]:
    return lambda *args: kind(*args) if all(type(n) in (int, float, type(None)) for n in args) else NotImplemented


def _from_bytes(kind: type) -> Callable[..., Any]:
    """Only of bytes: of a number they would be that long."""
    return lambda *args: kind(*args) if all(type(part) is bytes for part in args) else NotImplemented


def _encode(*args: Any) -> Any:
    """How protocol 2 writes bytes: as the text whose latin-1 encoding they are."""
    fits = len(args) == 2 and type(args[0]) is str and args[1] == "latin1"
    return args[0].encode("latin1") if fits else NotImplemented


_BUILTINS = ("builtins", "__builtin__")  # now, and in protocol 2
_VALUES: list[tuple[str, str, type | Callable[..., Any], Callable[..., Any]]] = [
    ("collections", "OrderedDict", OrderedDict, _ordered_dict),
    ("_codecs", "encode", codecs.encode, _encode),
    *((module, "set", set, _from_list(set)) for module in _BUILTINS),
    *((module, "frozenset", frozenset, _from_list(frozenset)) for module in _BUILTINS),
    *((module, "complex", complex, _from_numbers(complex)) for module in _BUILTINS),
    *((module, "slice", slice, _from_numbers(slice)) for module in _BUILTINS),
    ("builtins", "range", range, _from_numbers(range)),
    ("__builtin__", "xrange", range, _from_numbers(range)),
    *((module, "bytes", bytes, _from_bytes(bytes)) for module in _BUILTINS),
    *((module, "bytearray", bytearray, _from_bytes(bytearray)) for module in _BUILTINS),
]
TORCH_SIZE = Global("torch", "Size", _size)
PLAIN_VALUES: Mapping[tuple[str, str], Global] = MappingProxyType(
    {(module, name): Global(module, name, build) for module, name, _, build in _VALUES}
    | {("torch", "Size"): TORCH_SIZE}
)
_WRITABLE = {id(kind) for _, _, kind, _ in _VALUES}


class Unpickler(pickle.Unpickler):
    """Reads a pickle; nothing that it names is imported or called.

    `known` holds what becomes a value; all else becomes a placeholder. `globals_seen` collects the
    (module, name) pairs met: what a normal loader would have imported, and may have called.
    """

    known: ClassVar[Mapping[tuple[str, str], Global]] = PLAIN_VALUES

    def __init__(self, data: bytes, source: str) -> None:
        """data: the pickle. source: how errors name the file that it came from."""
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._data = data
        self.source = source
        self.globals_seen: set[tuple[str, str]] = set()
        self._frozensets = 0

    def find_class(self, module: str, name: str) -> Global:
        self.globals_seen.add((module, name))
        if len(self.globals_seen) > budget.GLOBALS:
            raise UnsafeFileError(f"its pickle names more than {budget.GLOBALS:,} classes and functions; do not use it")
        if name == "frozenset" and module in _BUILTINS:
            return Global(module, name, self._frozenset)
        return self.known.get((module, name)) or named(module, name)

    def _frozenset(self, *args: Any) -> Any:
        """One more, made by a call (protocols 2 and 3), which `budget` does not tell from others."""
        self._frozensets += 1
        if self._frozensets > budget.FROZENSETS:
            raise UnsafeFileError(
                f"its pickle has more than {budget.FROZENSETS:,} frozensets, which may all have one hash; do not use it"
            )
        return _from_list(frozenset)(*args)

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafeFileError(f"it refers to {pid!r}, something outside its pickle, where no such thing is")

    def _load(self) -> Any:
        unfolds = budget.examine(self._data)
        if unfolds or tuple_opcodes_at_most(self._data) > DEEPEST_TUPLE:
            self.rehearse()
        with comparisons_at_most(COMPARISONS):
            return super().load()

    def rehearse(self) -> None:
        """Go through the pickle, slowly and making no values. UnsafeFileError or RecursionError where a tuple in it
        unfolds to too many, or is nested too deep."""
        _Rehearsal(io.BytesIO(self._data), encoding="utf-8").load()

    def load(self) -> Any:
        """The object in the pickle. Raises UnsafeFileError or CheckpointError, whatever the pickle does."""
        try:
            return self._load()
        except CkptlabError as error:
            raise type(error)(f"{self.source}: {shorten(str(error), 400)}") from None
        except MemoryError:
            raise CheckpointError(
                f"{self.source}: there is not enough memory or address space to read its pickle of "
                f"{len(self._data):,} bytes: raise the limit (ulimit -v)"
            ) from None
        except Exception as error:  # a hostile or cut pickle may raise anything
            said = f"{type(error).__name__}: {shorten(str(error), 200)}"
            raise CheckpointError(
                f"{self.source}: its pickle cannot be read ({said}). It is damaged, "
                f"nested too deep, or holds objects of a class made at run time; get it again, or save it "
                f"without such objects"
            ) from error


def loads(data: bytes, source: str) -> Any:
    """The object in a pickle, by an `Unpickler`. source: how errors name the file that it came from."""
    return Unpickler(data, source).load()


def tuple_opcodes_at_most(data: bytes) -> int:
    """A number that the tuples which a pickle makes do not exceed."""
    return sum(map(data.count, (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3))) + min(data.count(b"("), data.count(b"t"))


class _Rehearsal(_PythonUnpickler):
    """Python's slow unpickler on placeholders alone, to refuse tuples nested too deep, and many of one hash."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(_PythonUnpickler.dispatch)

    def load(self) -> Any:
        self.sizes: dict[int, int] = {}  # how many tuples and parts of tuples one unfolds to
        self.depths: dict[int, tuple[int, Any]] = {}  # by id; the tuple with it, so that its id is not used again
        self.alike: dict[int, list[Any]] = {}  # by hash: different tuples
        return super().load()

    def find_class(self, module: str, name: str) -> Global:
        return named(module, name)

    def persistent_load(self, pid: Any) -> None:
        return None

    def _measure(self, load: Callable[..., None]) -> None:
        load(self)
        made = self.stack[-1]
        depth = 1 + max((self.depths[id(part)][0] for part in made if id(part) in self.depths), default=0)
        if depth > DEEPEST_TUPLE:
            raise RecursionError(f"tuples more than {DEEPEST_TUPLE} deep")
        size = 1 + sum(self.sizes.get(id(part), 1) for part in made)
        if size > LARGEST_TUPLE:
            raise UnsafeFileError(
                f"its pickle holds a tuple that unfolds to more than {LARGEST_TUPLE:,}; do not use it"
            )
        self.depths[id(made)] = depth, made
        self.sizes[id(made)] = size
        if size <= MEASURED:
            self._compare(made)

    def _compare(self, made: tuple[Any, ...]) -> None:
        try:
            others = self.alike.setdefault(hash(made), [])
        except TypeError:  # what cannot be hashed is no key
            return
        if made not in others:
            others.append(made)
        if len(others) > ALIKE:
            raise UnsafeFileError(f"its pickle holds more than {ALIKE:,} tuples of one hash; do not use it")

    for _opcode in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_opcode[0]] = lambda self, load=dispatch[_opcode[0]]: self._measure(load)
    del _opcode


class Pickler(_PythonPickler):
    """Writes plain values and placeholders in protocol 2. (The C pickler insists on importing what it names.)

    Raises TypeError for anything else: a file must not need ckptlab's classes, or others that we have.
    """

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(_PythonPickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, protocol=2)

    def save_foreign(self, obj: Foreign) -> None:
        self.save(obj.callee)
        self.save(obj.args)
        if obj.kwargs:
            self.save(obj.kwargs)
            self.write(pickle.NEWOBJ_EX)  # of protocol 4, yet read in any; protocol 2 would need a functools.partial
        else:
            self.write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
        if id(obj) in self.memo:  # its arguments led back to it, and it was written while they were
            self.write(pickle.POP + self.get(self.memo[id(obj)][0]))
            return
        self.memoize(obj)
        for element in obj.elements:
            self.save(element)
            self.write(pickle.APPEND)
        for key, value in obj.items:
            self.save(key)
            self.save(value)
            self.write(pickle.SETITEM)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    def save_name(self, obj: Global) -> None:
        if obj.args is not None:
            self.save_reduce(named(obj.module, obj.name), obj.args, obj=obj)
            return
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        self.memoize(obj)

    def save_size(self, obj: Size) -> None:
        self.save_reduce(TORCH_SIZE, (tuple(obj),), obj=obj)

    dispatch[Foreign] = save_foreign
    dispatch[Global] = save_name
    dispatch[Size] = save_size

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if id(obj) not in _WRITABLE:
            raise TypeError(
                f"cannot write {brief(obj)} or what is made from it: only plain values, tensors and placeholders "
                f"(ckptlab.formats.torch.pickles.foreign, named) go into a checkpoint file"
            )
        super().save_global(obj, name)

    dispatch[FunctionType] = save_global


def dumps(obj: Any, pickler: Callable[[BinaryIO], Pickler] = Pickler) -> bytes:
    """The pickle of an object, by a `Pickler`."""
    out = io.BytesIO()
    try:
        pickler(out).dump(obj)
    except RecursionError:
        raise CheckpointError("cannot write an object that is nested too deep for Python's pickler") from None
    return out.getvalue()
