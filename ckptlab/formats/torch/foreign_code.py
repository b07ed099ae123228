"""Classes and functions that the pickles name: what a normal loader would have imported, and may have called.

What torch, numpy and DeepSpeed write of plain values is known by exact names (a prefix would let `torch.hub.load`
through). All else is somebody's code: of Python's own modules nothing but value types belongs into a checkpoint.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping

from ckptlab.findings import Finding, Where
from ckptlab.formats.torch.torchfile import KNOWN_GLOBALS, is_of_storages
from ckptlab.words import some

_TORCH = re.compile(
    r"\w+Storage|Tensor|Size|device|(?:b?float|u?int|complex|q?u?int)\d+(?:_\w+)?|bool|float|half|double"
)
_PLAIN = {
    "_codecs": "encode",
    "_io": "BytesIO",
    "argparse": "Namespace",
    "array": "array",
    "collections": "OrderedDict defaultdict deque Counter",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "numpy": "ndarray dtype bool_ int64 int32 float64 float32",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.multiarray": "_reconstruct scalar",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "torch._utils": "_rebuild_sparse_tensor _rebuild_qtensor _rebuild_nested_tensor _rebuild_wrapper_subclass "
    "_rebuild_meta_tensor_no_storage",
    "torch.nn.parameter": "Parameter",
    "torch.serialization": "_get_layout",
    "torch.storage": "UntypedStorage TypedStorage",
    "types": "SimpleNamespace",
    "uuid": "UUID",
    "deepspeed.checkpoint.universal_checkpoint": "SubparamShape",
    "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler",
    "deepspeed.runtime.zero.config": "ZeroStageEnum",
    "deepspeed.utils.tensor_fragment": "fragment_address",
    **dict.fromkeys(("builtins", "__builtin__"), "object list dict tuple int float str bool"),
}
_PLAIN_PAIRS = {(module, name) for module, names in _PLAIN.items() for name in names.split()}
_OWN_VALUES = ("torch", "numpy")  # packages whose value types are all known above


def classes(seen: Mapping[str, Iterable[tuple[str, str]]]) -> Iterator[Finding]:
    """Findings on what the pickles of some files name. seen: file → (module, name) pairs."""
    files_of: dict[tuple[str, str], list[str]] = {}
    for file, pairs in seen.items():
        for pair in pairs:
            if not _plain(*pair):
                files_of.setdefault(pair, []).append(file)
    for pair, files in sorted(files_of.items()):
        yield (_code if _is_code(pair[0]) else _foreign)(".".join(pair), files)


def _plain(module: str, name: str) -> bool:
    known = (module, name) in _PLAIN_PAIRS or (module, name) in KNOWN_GLOBALS
    of_device = is_of_storages(module) and name.endswith("Storage")
    return known or ((module in ("torch", "torch.cuda") or of_device) and _TORCH.fullmatch(name) is not None)


def _is_code(module: str) -> bool:
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in _OWN_VALUES or top in ("__builtin__", "copy_reg")


def _code(name: str, files: list[str]) -> Finding:
    return Finding(
        "executable-pickle",
        "error",
        Where(files=tuple(files)),
        "plain values, tensors, and classes of the training program",
        f"the pickle of {some(files, 3)} names {name}, which is no type of plain values: "
        "torch.load(weights_only=False) would have imported it, and called it if the pickle says so; ckptlab did not",
        "load these files with nothing but ckptlab or torch.load(weights_only=True) until you know who wrote them",
        "code",
    )


def _foreign(name: str, files: list[str]) -> Finding:
    return Finding(
        "foreign-class",
        "info",
        Where(files=tuple(files)),
        "values that load without the training program",
        f"the pickle of {some(files, 3)} names {name}: a loader imports that module and runs what the class does when "
        "it is unpickled, and fails where the module is not installed. ckptlab keeps it as a name",
        "load it with DeepSpeed only where that code is installed and trusted",
        "code",
    )
