"""Writing a kernel: arguments, SRAM, and operations whose order the builder works out.

An engine runs its own operations in the order they are written here; engines run beside each other. The builder
remembers which operation last wrote and read each piece of SRAM, and gives an operation the semaphores it needs to wait
for the others. Each engine of a tile counts in one semaphore the operations that anybody waits for; since waits are
>= and never consume, two waits and one post an operation are always enough, and operations written in any order that
makes sense from top to bottom cannot hang.

Writing order is still worth a thought: the DMA engine is one queue, so the load of the next block should be written
before the store of this one (see `maia_rt.kernels.blocking.pipelined`).
"""

from __future__ import annotations

from collections.abc import Sequence

from maia_rt.contract.program import Arg, ArgKind, Capabilities, Dtype, Engine, KernelImage, Space, Stream
from maia_rt.errors import InvalidArgument, InvalidType, ProgramError
from maia_rt.kernels.operation import Operation, encode
from maia_rt.kernels.tile import Scalar, TileBuilder
from maia_rt.kernels.view import View, contiguous_strides


class KernelBuilder:
    """A kernel in the making.

    Parameters
    ----------
    name : str
    capabilities : Capabilities
        Of the device it is built for; tiles and SRAM past them are refused at once.

    Examples
    --------
    >>> from maia_rt.contract.program import ArgKind, Capabilities, Dtype
    >>> device = Capabilities(tiles=4, tile_sram_bytes=1 << 21, tile_semaphores=16, max_args=16, max_kernels=64)
    >>> builder = KernelBuilder("double", device)
    >>> x = builder.argument("x", ArgKind.IN, Dtype.FP32, (8, 32))
    >>> y = builder.argument("y", ArgKind.OUT, Dtype.FP32, (8, 32))
    >>> tile = builder.tile(0)
    >>> block = tile.allocate((8, 32), Dtype.FP32)
    >>> for operation in (tile.move(block, x), tile.scale(block, block, 2.0), tile.move(y, block)):
    ...     print(operation.opcode.name)
    MOVE
    SCALE
    MOVE
    >>> builder.build().tile_semaphores
    3
    """

    def __init__(self, name: str, capabilities: Capabilities) -> None:
        self.name = name
        self.capabilities = capabilities
        self._args: list[Arg] = []
        self._tiles: dict[int, TileBuilder] = {}

    def argument(self, name: str, kind: ArgKind, dtype: Dtype, shape: Sequence[int], *, alignment: int = 64) -> View:
        """Declare the next buffer argument.

        Parameters
        ----------
        name : str
        kind : ArgKind
            IN, OUT or INOUT.
        dtype : Dtype
        shape : sequence of int
            In elements, C order; the last axis of an MX type is a multiple of 32.
        alignment : int
            Of the address that a launch gives, in bytes, a power of two up to 4,096.

        Returns
        -------
        View

        Raises
        ------
        InvalidArgument
            An extent below 1, or more arguments than the device takes.
        """
        extents = tuple(int(e) for e in shape)
        if not extents or min(extents) < 1 or kind is ArgKind.SCALAR:
            raise InvalidArgument(f"kernel {self.name!r}: argument {name!r} of shape {extents}",
                                  cause="a buffer argument has one axis or more, each of one element or more")
        strides = contiguous_strides(extents, dtype)
        self._declare(Arg(name, kind, dtype, extents, alignment))
        return View(Space.ARG, len(self._args) - 1, 0, dtype, extents, strides, None)

    def scalar(self, name: str) -> Scalar:
        """Declare the next argument as an FP32 number given at launch."""
        self._declare(Arg(name, ArgKind.SCALAR, Dtype.FP32, (), 8))
        return Scalar(len(self._args) - 1)

    def _declare(self, arg: Arg) -> None:
        if len(self._args) >= self.capabilities.max_args:
            raise InvalidArgument(f"kernel {self.name!r}: argument {arg.name!r} is one too many",
                                  cause=f"the device takes {self.capabilities.max_args} arguments a kernel")
        if arg.dtype not in self.capabilities.dtypes:
            raise InvalidType(f"kernel {self.name!r}: argument {arg.name!r}: the device has no {arg.dtype.name}")
        self._args.append(arg)

    def tile(self, number: int) -> TileBuilder:
        """Tile ``number`` of the kernel, counted from 0; the device chooses which of its tiles that is."""
        if not 0 <= number < self.capabilities.tiles:
            raise InvalidArgument(f"kernel {self.name!r}: tile {number} of {self.capabilities.tiles}")
        tile = self._tiles.get(number)
        if tile is None:
            tile = self._tiles[number] = TileBuilder(self.name, number, self.capabilities, self._args)
        return tile

    def build(self) -> KernelImage:
        """Assign semaphores and encode.

        Returns
        -------
        KernelImage
            One stream for each engine that has operations.

        Raises
        ------
        ProgramError
            Nothing was written.
        """
        lists: list[list[Operation]] = []
        semaphores = 0
        for number in sorted(self._tiles):
            tile = self._tiles[number]
            for engine in Engine:
                if tile.operations[engine]:
                    lists.append(tile.operations[engine])
                    semaphores = max(semaphores, engine + 1)
        if not lists:
            raise ProgramError(f"kernel {self.name!r} has no operations")
        encoded = encode(lists)
        streams = []
        start = 0
        for operations in lists:
            end = start + len(operations)
            streams.append(Stream(operations[0].tile, operations[0].engine, encoded[start:end]))
            start = end
        return KernelImage(
            self.name, tuple(self._args), tuple(streams), max(self._tiles) + 1,
            max((t.used for t in self._tiles.values()), default=0), semaphores, 0)
