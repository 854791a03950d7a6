"""How numbers and texts reach a page that may not fetch anything: as scripts, since `file://` allows nothing else.

A chunk is a script of one line, `loaded("name", "base64")`. What is encoded is gzip of a little-endian uint32, the length of a
JSON header; the header; zeros up to a multiple of 4; and the arrays. In the header, an array stands as
`{"$": [dtype, offset, count, width]}` at its place: offset in bytes from where the arrays begin, width null for one
dimension. `site/data.js` reads it.
"""

import gzip
import json
import struct
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_autoencoder.files import whole_file

DTYPES = ("float32", "int32", "uint32", "uint16", "uint8")
"""What JavaScript has arrays of, and no others are written."""
ALIGNED = 4
"""Bytes; a typed array has to start at a multiple of its size."""
LEVEL = 6
"""Of compression."""


def write_chunk(data: Path, name: str, content: Mapping[str, Any]) -> int:
    """Write a chunk to `<data>/<name>.js`.

    Args:
        data: folder of the chunks.
        name: its name, `0/concepts`, by which the page asks for it.
        content: what JSON can hold, and arrays of one of DTYPES with one or two dimensions in any place.

    Returns:
        The size of the file in bytes.

    Raises TypeError if an array has another dtype.
    """
    text = b64encode(gzip.compress(packed(content), LEVEL, mtime=0)).decode()
    script = f"loaded({json.dumps(name)},{json.dumps(text)})\n"
    with whole_file(data / f"{name}.js") as temporary:
        temporary.write_text(script, encoding="ascii", newline="")
    return len(script)


def packed(content: Mapping[str, Any]) -> bytes:
    """The content of a chunk before it is compressed. Raises TypeError as `write_chunk`."""
    arrays, n_bytes = list[bytes](), 0

    def plain(value: Any) -> Any:
        nonlocal n_bytes
        if isinstance(value, np.ndarray):
            found, padding = _bytes(value)
            arrays.append(found + padding)
            place = [value.dtype.name, n_bytes, value.size, value.shape[1] if value.ndim == 2 else None]
            n_bytes += len(arrays[-1])
            return {"$": place}
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return value

    # ASCII: a lone surrogate in a name would be no UTF-8. NaN is no JSON.
    header = json.dumps(plain(content), allow_nan=False, separators=(",", ":")).encode("ascii")
    return struct.pack("<I", len(header)) + header + b"\0" * (-len(header) % ALIGNED) + b"".join(arrays)


def _bytes(array: NDArray[Any]) -> tuple[bytes, bytes]:
    if array.dtype.name not in DTYPES or array.ndim not in (1, 2):
        raise TypeError(f"a chunk holds no array of {array.dtype} with {array.ndim} dimensions")
    found = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    return found, b"\0" * (-len(found) % ALIGNED)
