"""A pickle must not be able to run anything: neither by the names it asks for nor by the instructions it uses."""

from __future__ import annotations

import collections
import contextlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from catapult_ext.data.restricted_pickle import PickledArray, load_plain


class Call:
    """Pickles as the call `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_the_attack_works_on_the_plain_reader(tmp_path):
    """The control: without it the tests below could pass because the files are harmless."""
    marker = tmp_path / "ran"
    assert pickle.loads(pickle.dumps(Call(Path.touch, marker))) is None
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"data": v, "labels": [1]}, lambda v: [[v]]])
def test_no_named_function_is_run(tmp_path, protocol, wrap):
    import os

    marker = tmp_path / "ran"
    for call in (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(subprocess.run, ["touch", str(marker)]),
        Call(Path.touch, marker),
        Call(np.lib.format.open_memmap, str(marker), "w+", "u1", (1,)),
    ):
        with pytest.raises(ValueError, match=r"it asks for .*nothing was run|damaged or no such pickle"):
            load_plain(pickle.dumps(wrap(call), protocol))
    assert not marker.exists()


def test_the_message_names_what_the_file_asked_for():
    import os

    for protocol in (2, 4):
        with pytest.raises(
            ValueError, match=rf"it asks for {os.name}\.system, which no batch needs; nothing was run"
        ):
            load_plain(pickle.dumps(Call(os.system, "true"), protocol))


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "it asks for os.system"),
        (b"(S'true'\nios\nsystem\n.", "damaged or no such pickle"),  # INST
        (b"(cos\nsystem\nS'true'\no.", "it asks for os.system"),  # OBJ
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "damaged or no such pickle"),  # NEWOBJ
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it asks for os.system"),  # STACK_GLOBAL
        (b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.", r"it asks for numpy\.ndarray\.__init__"),
        (b"\x82\x01.", "damaged or no such pickle"),  # EXT1: the extension registry
        (b"Phello\n.", "damaged or no such pickle"),  # PERSID
        (b"\x80\x05\x96" + b"\xff" * 7 + b"\x00.", "damaged or no such pickle"),  # BYTEARRAY8 of 2^56 bytes
        (b"\x80\x02cnumpy\ndtype\n}b.", "damaged or no such pickle"),  # BUILD of a class
        (b"\x80\x02cnumpy\nndarray\nN}U\x08__init__K\x01s\x86b.", "damaged or no such pickle"),
        (b"\x80\x02K\x01(K\x02tR.", "damaged or no such pickle"),  # REDUCE of an integer
        (b"\x80\x02", "damaged or no such pickle"),
        (b"", "damaged or no such pickle"),
    ],
)
def test_instructions_that_could_reach_code_are_refused(instructions, reason):
    with pytest.raises(ValueError, match=reason):
        load_plain(instructions)


def test_a_file_cannot_change_the_reader():
    """BUILD on one of the two names would set attributes of our own classes."""
    before = dict(vars(PickledArray))
    for state in (b"}U\x05numpyK\x01s", b"N}U\x05numpyK\x01s\x86"):
        with pytest.raises(ValueError, match="damaged"):
            load_plain(b"\x80\x02cnumpy\nndarray\n" + state + b"b.")
    assert dict(vars(PickledArray)) == before


def test_a_huge_memo_index_costs_no_memory():
    # The reader in C allocates an array up to the index: 34 GB for this file of 13 bytes.
    assert load_plain(b"\x80\x02K\x07r\xff\xff\xff\xff.") == 7


VALUES = st.recursive(
    st.integers(-(2**31), 2**31 - 1)
    | st.text(max_size=5)
    | st.none()
    | st.booleans()
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([3, 4]))
def test_plain_values_come_back(value, protocol):
    assert load_plain(pickle.dumps(value, protocol)) == value


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_arbitrary_bytes_give_a_value_or_an_error(content):
    for data in (content, b"\x80\x02" + content, content + b"."):
        with contextlib.suppress(ValueError):
            load_plain(data)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_that_python_3_saved(order, protocol):
    array = np.array(np.random.default_rng(0).integers(0, 256, (5, 7)), np.uint8, order=order)
    read = load_plain(pickle.dumps({"data": array}, protocol))["data"].numpy()
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)
    assert not read.flags.writeable


def test_arrays_that_python_2_saved(as_python2):
    array = np.random.default_rng(0).integers(0, 256, (5, 7), np.uint8)
    read = load_plain(as_python2({"data": array}))
    assert list(read) == [b"data"]
    np.testing.assert_array_equal(read[b"data"].numpy(), array)


def test_other_arrays_are_refused(as_python2):
    for array in (np.zeros(3, np.int8), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="the array in it is not one of uint8"):
            load_plain(as_python2({"data": array}))[b"data"].numpy()
    with pytest.raises(ValueError, match="the array in it is not one of uint8"):
        PickledArray().numpy()  # no state at all
    content = as_python2(np.zeros(300, np.uint8))
    assert load_plain(content).numpy().shape == (300,)
    with pytest.raises(ValueError, match=r"the array in it has 300 bytes for shape \(301,\)"):
        load_plain(content.replace(b"(M\x2c\x01t", b"(M\x2d\x01t")).numpy()  # one more than there are bytes
    with pytest.raises(ValueError, match="no valid shape"):
        load_plain(content.replace(b"(M\x2c\x01t", b"(J\xff\xff\xff\xfft")).numpy()


def test_collections_are_not_needed():
    with pytest.raises(ValueError, match=r"it asks for collections\.OrderedDict"):
        load_plain(pickle.dumps(collections.OrderedDict(a=1), 4))


def test_reading_imports_nothing():
    """`find_class` of the standard library imports the module that a file names; ours must not."""
    assert "antigravity" not in sys.modules
    with pytest.raises(ValueError, match=r"it asks for antigravity\.fly"):
        load_plain(b"cantigravity\nfly\n.")
    assert "antigravity" not in sys.modules
