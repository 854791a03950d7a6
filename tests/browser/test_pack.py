"""Chunks, read back by an unpacker of its own that follows the description in pack.py."""

import base64
import gzip
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dncbm.browser.pack import DTYPES, packed, write_chunk

HOSTILE = ["</script><script>alert(1)//", '"\\\n\u2028', "\udc80 lone", "🐦 שלום \u202e", "x" * 500, "\0"]


def unpacked(raw: bytes) -> Any:
    (length,) = struct.unpack_from("<I", raw)
    start = -(-(4 + length) // 4) * 4
    assert set(raw[4 + length : start]) <= {0}

    def array(value: dict[str, Any]) -> Any:
        if set(value) != {"$"}:
            return value
        dtype, offset, count, width = value["$"]
        kind = np.dtype(dtype).newbyteorder("<")
        assert (start + offset) % kind.itemsize == 0
        found = np.frombuffer(raw, kind, count, start + offset)
        return found if width is None else found.reshape(-1, width) if width else np.zeros((0, 0), kind)

    return json.loads(raw[4 : 4 + length], object_hook=array)


def read_chunk(path: Path) -> tuple[str, Any]:
    text = path.read_bytes().decode("ascii")
    found = re.fullmatch(r"loaded\((\"[^\"]*\"),\"([A-Za-z0-9+/=]*)\"\)\n", text)
    assert found
    return json.loads(found[1]), unpacked(gzip.decompress(base64.b64decode(found[2], validate=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_what_is_packed_is_read_back(dtype: str, data: st.DataObject) -> None:
    shapes = array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5).filter(lambda shape: shape[-1] or len(shape) == 1)
    found = data.draw(st.lists(arrays(dtype, shapes), max_size=4))
    text = data.draw(st.text(st.characters(exclude_categories=()), max_size=5))
    content = unpacked(packed({"arrays": found, "deep": {"er": [text, None, 1.5, *found]}}))
    again = [*content["arrays"], *content["deep"]["er"][3:]]
    for array, back in zip([*found, *found], again, strict=True):
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    assert content["deep"]["er"][:3] == [text, None, 1.5]


def test_arrays_of_any_layout_or_byte_order() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    for odd in (matrix.T, matrix[:, ::2], matrix.astype(">f4")):
        np.testing.assert_array_equal(unpacked(packed({"a": odd}))["a"], odd)


def test_a_chunk_is_one_line_of_ascii(tmp_path: Path) -> None:
    content = {"texts": HOSTILE, "numbers": np.float32([1, np.nan, np.inf])}
    size = write_chunk(tmp_path, "0/concepts", content)
    path = tmp_path / "0" / "concepts.js"
    name, found = read_chunk(path)
    assert name == "0/concepts"
    assert found["texts"] == HOSTILE
    np.testing.assert_array_equal(found["numbers"], content["numbers"])
    assert path.stat().st_size == size
    first = path.read_bytes()
    write_chunk(tmp_path, "0/concepts", content)
    assert path.read_bytes() == first


@pytest.mark.parametrize("array", [np.zeros(2), np.zeros(2, np.int64), np.zeros((1, 1, 1), np.float32), np.array(["a"])])
def test_other_arrays_are_refused(array: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=str(array.dtype)):
        write_chunk(tmp_path, "bad", {"array": [array]})
    assert not list(tmp_path.iterdir())


def test_nan_outside_of_arrays_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        packed({"a": float("nan")})
