"""The C compiler and numpy put every field of every shared structure at the same place."""

import memory_layouts
import pytest

from maia_rt._fast import layout

COMPILED = layout.structures()


def test_every_structure_is_compiled():
    assert set(COMPILED) == set(memory_layouts.STRUCTS)


@pytest.mark.parametrize("name", sorted(memory_layouts.STRUCTS))
def test_c_and_numpy_agree_on_size_and_offsets(name):
    dtype = memory_layouts.STRUCTS[name]
    expected = {"": dtype.itemsize} | {field: dtype.fields[field][1] for field in dtype.names}
    assert COMPILED[name] == expected
