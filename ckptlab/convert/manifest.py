"""The manifest of a destination: every file's size and CRC-32, as they were written. Another program can check them:
it is the CRC-32 of zip and gzip, of the whole file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from ckptlab import paths

MANIFEST = "ckptlab-manifest.json"
_VERSION = 1
_LONGEST = 4096  # characters of a path


def write(folder: str, files: Mapping[str, tuple[int, int]]) -> str:
    """Write the manifest of a folder; files: name → bytes, CRC-32. Returns its path."""
    path = os.path.join(folder, MANIFEST)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text(files))
    return path


def text(files: Mapping[str, tuple[int, int]]) -> str:
    """What a manifest says; files: name → bytes, CRC-32."""
    listed = {name: {"size": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(files.items())}
    return json.dumps({"ckptlab": _VERSION, "files": listed}, indent=1) + "\n"


def read(folder: str) -> dict[str, tuple[int, int]] | None:
    """What the manifest of a folder says: name → bytes, CRC-32; None where there is none.

    ValueError where it is no manifest. Names that lead out of the folder are none of its files.
    """
    path = os.path.join(folder, MANIFEST)
    if not paths.is_file(path):
        return None
    if paths.size(path) > 1 << 28:
        raise ValueError(f"{path}: it is too large for a manifest")
    try:
        told = json.loads(paths.text(path))["files"]
        found = {name: (int(entry["size"]), int(entry["crc32"], 16)) for name, entry in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path}: it is no manifest of ckptlab ({type(error).__name__})") from None
    outside = [name for name in found if os.path.isabs(name) or ".." in name.split("/") or "\0" in name]
    if long := [name for name in found if len(name) > _LONGEST]:
        raise ValueError(f"{path}: it names a file of {len(long[0]):,} characters, which no file system can hold")
    if outside:
        raise ValueError(f"{path}: it names {outside[0]!r}, which lies outside of its folder")
    return found
