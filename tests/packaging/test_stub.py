"""`_C.pyi` is equal to the compiled module: names, arguments, types."""

from __future__ import annotations

import stub_writer

from catapult_ext import _C


def test_the_stub_equals_the_module() -> None:
    live = stub_writer.normalised(stub_writer.live_lines(_C))
    written = stub_writer.normalised(stub_writer.stub_lines())
    assert len(live) > 4
    assert {name: written.get(name) for name in live} == live
    extra = written.keys() - live.keys()
    if _C.compile_info()["cuda_archs"]:
        assert not extra
    else:
        assert all(name.startswith(stub_writer.CUDA_PREFIX) for name in extra), extra


def test_a_changed_signature_would_be_seen() -> None:
    live = stub_writer.live_lines(_C)
    name = next(name for name, line in live.items() if "(name: str)" in line)
    written = stub_writer.stub_lines()
    assert (
        stub_writer.normalised({name: live[name].replace("str", "int")})[name]
        != stub_writer.normalised(written)[name]
    )
