"""Views and strided copies: what numpy does, on memory of the device."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maia_rt import CopyPath
from maia_rt.errors import ClosedError, InvalidArgument, InvalidType
from maia_rt.runtime import strides
from tests.helpers import tiny_program


def numbers(*shape, dtype=np.int32):
    return np.arange(np.prod(shape), dtype=dtype).reshape(shape)


@settings(deadline=None)
@given(st.data())
def test_indexing_is_numpys(data):
    array = np.empty(data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)), np.int16)
    item = data.draw(hnp.basic_indices(array.shape, allow_newaxis=False))
    found = array[(*item, ...) if isinstance(item, tuple) and Ellipsis not in item else item]
    found = array[item] if not isinstance(array[item], np.generic) else found
    offset, shape, steps = strides.index(array.shape, array.strides, item)
    assert shape == np.shape(found)
    if isinstance(found, np.ndarray) and found.size:
        assert offset == found.ctypes.data - array.ctypes.data
        assert [s for s, n in zip(steps, shape, strict=True) if n > 1] == [
            s for s, n in zip(found.strides, shape, strict=True) if n > 1]


@settings(deadline=None)
@given(hnp.array_shapes(max_dims=5, max_side=7), st.integers(1, 9), st.integers(1, 200))
def test_pieces_cover_an_array_once(shape, size, most):
    seen = np.zeros(shape, int)
    for part in strides.pieces(shape, size, most):
        seen[part] += 1
        assert seen[(*part, ...)].size * size <= max(most, size)
    assert (seen == 1).all()


def test_a_walk_joins_what_lies_side_by_side():
    assert strides.walk((4, 5, 6), (120, 24, 4), (120, 24, 4), 4) == (480, (), (), ())
    assert strides.walk((4, 5, 6), (240, 24, 4), (120, 24, 4), 4) == (120, (4,), (240,), (120,))
    assert strides.walk((5, 6), (24, 4), (4, 20), 4) == (4, (5, 6), (24, 4), (4, 20))
    assert strides.walk((5, 0), (24, 4), (4, 20), 4).run == 0


KINDS = [("device", "other"), ("device", "pinned"), ("pinned", "device"), ("device", "host"), ("host", "device")]


def test_any_two_strided_ends_of_one_shape_are_copied_as_numpy_copies_them(attached):
    with attached.create_stream() as stream, attached.allocate(1 << 16) as one, attached.allocate(1 << 16) as other, \
            attached.allocate_host(1 << 16) as pinned:
        memories = {"device": one, "pinned": pinned, "other": other}

        @settings(max_examples=60, deadline=None)
        @given(st.data())
        def check(data):
            compare(stream, memories, data)

        check()


def compare(stream, memories, data):
    to, at = data.draw(st.sampled_from(KINDS))
    dtype = data.draw(st.sampled_from([np.uint8, np.int16, np.float32, np.complex128]))
    whole = data.draw(hnp.array_shapes(min_dims=1, max_dims=5, max_side=5))
    item = data.draw(hnp.basic_indices(whole, allow_newaxis=False).filter(lambda i: i is not Ellipsis))
    expected = np.random.default_rng(0).integers(0, 200, whole).astype(dtype)
    source = np.random.default_rng(1).integers(0, 200, whole).astype(dtype)
    memory = {kind: memories[kind].view(dtype, whole) for kind in memories}
    memory["host"] = np.asfortranarray(source) if at == "host" else expected.copy()
    if at != "host":
        stream.copy(memory[at], source)
    if to != "host":
        stream.copy(memory[to], expected)
    if np.ndim(expected[item]) == 0 and "host" in (to, at):
        return  # an element of an array is a number, not memory
    stream.copy(memory[to][item], memory[at][item])
    stream.synchronize()
    expected[item] = source[item]
    got = memory["host"] if to == "host" else np.empty(whole, dtype)
    if to != "host":
        stream.copy(got, memory[to])
    assert np.array_equal(got, expected)


def test_columns_go_by_one_command(device, stream):
    with device.upload(numbers(64, 64)) as matrix, device.allocate((64, 16), np.int32) as columns:
        before = stream.statistics().submitted
        assert stream.copy(columns, matrix[:, 8:24]) is CopyPath.DIRECT
        assert stream.statistics().submitted == before + 1
        assert np.array_equal(columns.copy_to_host(stream), numbers(64, 64)[:, 8:24])
        stream.copy(matrix[::-1, 0], matrix[:, 1])
        assert np.array_equal(matrix.copy_to_host(stream)[:, 0], numbers(64, 64)[::-1, 1])


def test_a_transposition_is_a_copy(device, stream):
    with device.upload(numbers(30, 50)) as matrix, device.allocate((50, 30), np.int32) as turned:
        for row in range(30):
            stream.copy(turned[:, row], matrix[row])
        assert np.array_equal(turned.copy_to_host(stream), numbers(30, 50).T)


def test_more_than_three_dimensions_take_several_commands(device, stream):
    shape = (3, 4, 5, 6)
    with device.allocate(tuple(2 * n for n in shape), np.int16) as large, device.upload(numbers(*shape).astype("<i2")) \
            as small:
        stream.fill(large, 0)
        part = large[tuple(slice(0, None, 2) for _ in shape)]
        before = stream.statistics().submitted
        stream.copy(part, small)
        assert stream.statistics().submitted == before + 12
        assert np.array_equal(part.copy_to_host(stream), numbers(*shape))
        assert large.copy_to_host(stream).astype(int).sum() == numbers(*shape).sum()


def test_strided_memory_of_the_host_is_staged_in_pieces(attached):
    """Larger than the staging memory, both ways."""
    array = numbers(1500, 1000)
    with attached.create_stream() as stream, attached.allocate((1500, 500), np.int32) as buffer:
        assert stream.copy(buffer, array[:, ::2]) is CopyPath.STAGED
        assert np.array_equal(buffer.copy_to_host(stream), array[:, ::2])
        target = np.zeros((500, 3000), np.int32)
        assert stream.copy(target.T[::2, ::-1], buffer) is CopyPath.STAGED
        assert np.array_equal(target.T[::2, ::-1], array[:, ::2])
        assert not target.T[1::2].any()


def test_an_array_over_pinned_memory_is_pinned_when_it_is_strided(attached):
    with attached.create_stream() as stream, attached.allocate_host((10, 10), np.float32) as host, \
            attached.allocate((10, 5), np.float32) as buffer:
        host.array[:] = numbers(10, 10)
        assert stream.copy(buffer, np.asarray(host)[::-1, ::2]) is CopyPath.DIRECT
        assert np.array_equal(buffer.copy_to_host(stream), numbers(10, 10)[::-1, ::2])


def test_views_share_memory_and_say_what_they_are(attached):
    with attached.allocate_host((4, 6), ml_dtypes.bfloat16) as host:
        part = host[1:, ::2]
        assert part.shape == (3, 3)
        assert part.strides == (12, 4)
        assert not part.contiguous
        assert part.nbytes == 18
        part.array[:] = 2
        assert host.array.astype(float).sum() == 18
        assert host[2].contiguous
        assert host[2, 4].shape == ()
        assert [row.address for row in host] == [host.address + 12 * i for i in range(4)]
        with pytest.raises(InvalidArgument, match="no other dtype or shape"):
            part.view()


@pytest.mark.parametrize(("item", "error"), [
    (4, IndexError), (-5, IndexError), ((0, 6), IndexError), ((0, 0, 0), InvalidArgument),
    ((..., ...), InvalidArgument),
    ("a", InvalidType), (1.5, InvalidType), (None, InvalidType), ([0, 1], InvalidType), (slice("a", None), InvalidType),
    (slice(None, None, 0), InvalidType), (np.array([True]), InvalidType),
])
def test_what_is_no_index_is_refused(attached, item, error):
    with attached.allocate((4, 6), np.float32) as buffer, pytest.raises(error):
        buffer[item]


def test_numpy_does_not_take_device_memory_for_a_sequence(attached):
    with attached.allocate(4, np.float32) as buffer, pytest.raises(InvalidType, match="copy_to_host"):
        np.asarray(buffer)


def test_what_does_not_fit_together_is_refused(attached):
    with attached.create_stream() as stream, attached.allocate((4, 6), np.float32) as buffer, \
            attached.allocate((4, 3), np.int16) as other:
        for dst, src, text in [
            (other, buffer[:, ::2], "has 24 bytes, src 48"),
            (buffer[:2, ::2], other, r"shape \(2, 3\) with elements of 4 bytes, src \(4, 3\)"),
            (np.broadcast_to(np.float32(0), (4, 3)), buffer[:, ::2], "read-only"),
            (np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), (4, 3), (0, 4)), buffer[:, ::2],
             "share memory"),
        ]:
            with pytest.raises(InvalidArgument, match=text):
                stream.copy(dst, src)
        with pytest.raises(InvalidArgument, match="strided view"):
            stream.fill(buffer[:, 0], 0)
        with pytest.raises(InvalidArgument, match="checksum"):
            stream.copy(buffer[:, 0], np.zeros(4, np.float32), checksum=True)
        assert stream.statistics().submitted == 0


def test_a_launch_takes_no_strided_view(attached):
    with attached.create_stream() as stream, attached.load(tiny_program.image(8)) as program, \
            attached.allocate((8, 2), np.float32) as wide, attached.allocate(8, np.float32) as out, \
            pytest.raises(InvalidArgument, match=r"argument 'x' is a strided view \(8,\) with strides \(8,\)"):
        stream.launch(program["axpy"], wide[:, 0], out, out, 1.0)


def test_a_closed_buffers_views_say_where_it_was_closed(attached):
    buffer = attached.allocate((4, 6), np.float32)
    part = buffer[:, ::2]
    buffer.close()
    for use in (lambda: part.address, lambda: part[0], buffer.view, lambda: attached.default_stream.copy(
            part, np.zeros((4, 3), np.float32))):
        with pytest.raises(ClosedError, match=r"closed, at .*test_views.py:\d+"):
            use()


def test_many_descriptors_at_once(attached):
    """Five dimensions that nothing joins: more commands than fit into the ring at once."""
    with attached.create_stream(entries=16) as stream, attached.allocate((16,) * 3 + (2, 2), np.uint8) as small, \
            attached.allocate((32,) * 3 + (4, 4), np.uint8) as large:
        data = np.random.default_rng(0).integers(0, 255, small.shape, np.uint8)
        stream.copy(small, data)
        part = large[tuple(slice(None, None, 2) for _ in range(5))]
        stream.copy(part, small)
        back = np.empty(small.shape, np.uint8)
        stream.copy(back, part)
        assert np.array_equal(back, data)
