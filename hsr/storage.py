"""One file per index: a header in JSON, raw arrays, and a checksum over everything before it.  No pickle.

    bytes 0..7     b"HSRINDEX"
    bytes 8..11    format version, little-endian uint32
    bytes 12..19   length of the header, little-endian uint64
    header         JSON: settings, the shape and dtype of each array in order, the structures' plain numbers
    arrays         raw, C order, little-endian
    last 32 bytes  BLAKE2b-256 of all before

The checksum is verified before anything else is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
import typing
from pathlib import Path
from typing import Any

import numpy as np

from hsr.backend import choose
from hsr.errors import StorageError
from hsr.growth import Segment
from hsr.structure import Structure

MAGIC = b"HSRINDEX"
VERSION = 2
PREFIX = struct.Struct("<8sIQ")
DIGEST = 32
DTYPES = ("float64", "float32", "int64", "int32", "uint8", "int8", "bool")


Own = tuple[np.ndarray, np.ndarray, np.ndarray]  # keys (g, s, d) as held; the roster's ``old`` ids; its ``dead``


def nbytes(structure: Structure) -> int:
    """Bytes that a structure holds besides the keys."""
    return sum(getattr(value, "nbytes", 8) for value in vars(structure).values())


def save(path: Path, settings: dict[str, Any], own: Own, segments: tuple[tuple[Segment, ...], ...]) -> None:
    """Write the index's own arrays and its segments beside ``path``, then rename: a crash leaves the old or the new."""
    arrays = list(own)
    heads = [[_described(segment, arrays) for segment in head] for head in segments]
    layout = [{"dtype": array.dtype.name, "shape": array.shape} for array in arrays]
    header = json.dumps({"settings": settings, "heads": heads, "arrays": layout}).encode()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            digest = hashlib.blake2b(digest_size=DIGEST)
            pieces: list[Any] = [PREFIX.pack(MAGIC, VERSION, len(header)), header]  # bytes, then buffers
            for piece in pieces + [np.ascontiguousarray(array) for array in arrays]:
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> tuple[dict[str, Any], Own, tuple[tuple[Segment, ...], ...]]:
    """Settings, the index's own arrays and segments of a file that `save` wrote; StorageError if it is not that."""
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        raise StorageError(f"{path} is not a saved index: it must begin with {MAGIC!r}; got {data[: len(MAGIC)]!r}")
    if len(data) < PREFIX.size + DIGEST:
        raise StorageError(f"{path} is truncated: {len(data)} bytes cannot hold a header and a checksum")
    _, version, length = PREFIX.unpack_from(data)
    if version != VERSION:
        raise StorageError(f"{path} has format version {version}; this library reads version {VERSION}")
    body = memoryview(data)[:-DIGEST]
    if hashlib.blake2b(body, digest_size=DIGEST).digest() != data[-DIGEST:]:
        raise StorageError(f"{path} is truncated or altered: its checksum does not match its content")
    header = json.loads(bytes(body[PREFIX.size : PREFIX.size + length]))
    arrays, position = [], PREFIX.size + length
    for entry in header["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        if dtype.name not in DTYPES:
            raise StorageError(f"{path} holds an array of dtype {dtype}; wanted one of {', '.join(DTYPES)}")
        size = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(body, dtype, size, position).reshape(shape).copy())
        position += size * dtype.itemsize
    kind = typing.get_type_hints(choose("build", header["settings"]["method"]))["return"]
    heads = tuple(tuple(_restored(entry, kind, arrays) for entry in head) for head in header["heads"])
    store, old, dead = arrays[:3]
    return header["settings"], (store, old, dead), heads


def _described(segment: Segment, arrays: list[np.ndarray]) -> dict[str, Any]:
    """A segment as JSON; its arrays are appended to ``arrays`` and named by position."""
    fields: dict[str, Any] = {}
    for name, value in vars(segment.structure).items():
        if isinstance(value, np.ndarray):
            fields[name] = {"array": len(arrays)}
            arrays.append(value)
        else:
            fields[name] = value
    return {"start": segment.start, "stop": segment.stop, "fields": fields}


def _restored(entry: dict[str, Any], kind: type[Structure], arrays: list[np.ndarray]) -> Segment:
    """The segment that `_described` wrote."""
    fields = {
        name: arrays[value["array"]] if isinstance(value, dict) else value for name, value in entry["fields"].items()
    }
    return Segment(entry["start"], entry["stop"], kind(**fields))
