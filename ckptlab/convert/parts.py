"""Files on their way into an object store, which become visible when they are completed and not before.

S3 keeps what was sent of a file in parts, under a number of its own: whoever knows the number and the parts may
complete the file, in another process too. Of other stores that can hold a file back fsspec does not tell how.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from ckptlab import far
from ckptlab.far import again, changed, inside, named

PART = 16 << 20  # bytes of a part; of larger files more, so that there are not too many
_MOST_PARTS = 10_000  # S3's


class Receipt(NamedTuple):
    """What S3 gave for a file that was sent: the number of its upload, and what names its parts."""

    upload: str
    parts: list[dict[str, Any]]


class Upload:
    """A file on its way up, where fsspec's file system can hold it back (`autocommit=False`)."""

    def __init__(self, path: str) -> None:
        self._path = path
        system, name = inside(path)
        with named(path):
            self._file = system.open(name, "wb", autocommit=False)
            with suppress(ValueError):
                system.transaction.files.remove(self._file)

    def send(self, near: str) -> None:
        """Send a file of this machine."""
        with open(near, "rb") as file, named(self._path):
            shutil.copyfileobj(file, self._file, far.REQUEST)
            self._file.close()

    def commit(self) -> None:
        with named(self._path):
            self._file.commit()
        changed(self._path)

    def discard(self) -> None:
        with named(self._path):
            self._file.discard()

    @property
    def receipt(self) -> Receipt | None:
        """What another process needs to go on; None where the store has nothing like it."""
        return None


class InParts(Upload):
    """The same in S3's own words, whatever the file's size: nothing of it stays in memory."""

    def __init__(self, path: str, receipt: Receipt | None = None) -> None:
        self._path = path
        self._system, name = inside(path)
        self._bucket, self._key, _ = self._system.split_path(name)
        made = self._ask("create_multipart_upload")["UploadId"] if receipt is None else receipt.upload
        self._receipt = receipt or Receipt(made, [])

    def _ask(self, method: str, **told: Any) -> Any:
        with named(self._path):
            return again(self._system, lambda: self._system.call_s3(method, Bucket=self._bucket, Key=self._key, **told))

    def send(self, near: str) -> None:
        size = max(PART, -(-os.path.getsize(near) // _MOST_PARTS))
        with open(near, "rb") as file:
            while (part := file.read(size)) or not self._receipt.parts:
                number = len(self._receipt.parts) + 1
                sent = self._ask("upload_part", UploadId=self._receipt.upload, PartNumber=number, Body=part)
                told = {key: sent[key] for key in ("ETag", "ChecksumSHA256") if key in sent}
                self._receipt.parts.append({"PartNumber": number, **told})

    def commit(self) -> None:
        whole = {"Parts": self._receipt.parts}
        self._ask("complete_multipart_upload", UploadId=self._receipt.upload, MultipartUpload=whole)
        changed(self._path)

    def discard(self) -> None:
        self._ask("abort_multipart_upload", UploadId=self._receipt.upload)

    @property
    def receipt(self) -> Receipt:
        return self._receipt

    def stored(self) -> Iterator[tuple[str, int]]:
        """ETag and bytes of each part that the store has."""
        more: dict[str, Any] = {}
        while True:
            told = self._ask("list_parts", UploadId=self._receipt.upload, **more)
            yield from ((part["ETag"], part["Size"]) for part in told.get("Parts", ()))
            if not told.get("IsTruncated"):
                return
            more = {"PartNumberMarker": told["NextPartNumberMarker"]}


def begin(path: str) -> Upload:
    """An upload of a file, in the way that its store has."""
    return InParts(path) if hasattr(inside(path)[0], "call_s3") else Upload(path)


def taken_up(path: str, receipt: Receipt, size: int) -> Upload | None:
    """An upload that was sent whole and not completed, by another process; None where the store has not all of it any
    more."""
    upload = InParts(path, receipt)
    try:
        stored = list(upload.stored())
    except OSError:
        return None
    same = [etag for etag, _ in stored] == [part["ETag"] for part in receipt.parts]
    return upload if same and sum(nbytes for _, nbytes in stored) == size else None


def abandon(folder: str, kept: Collection[str]) -> None:
    """Discard what was begun below a folder and is none of the uploads `kept`: nobody can complete it, and the store
    would keep it, and want to be paid for it. Where uploads may not be listed they stay."""
    system, name = inside(folder)
    if not hasattr(system, "call_s3"):
        return
    bucket, key, _ = system.split_path(name)
    more: dict[str, Any] = {}
    with suppress(OSError), named(folder):
        while True:
            told = system.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{key}/", **more)
            for one in told.get("Uploads", ()):
                if one["UploadId"] not in kept:
                    system.call_s3("abort_multipart_upload", Bucket=bucket, Key=one["Key"], UploadId=one["UploadId"])
            if not told.get("IsTruncated"):
                return
            more = {"KeyMarker": told["NextKeyMarker"], "UploadIdMarker": told["NextUploadIdMarker"]}
