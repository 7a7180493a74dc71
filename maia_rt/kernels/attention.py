"""Attention of all heads: heads are split and merged by strided DMA, products are batched over heads and sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maia_rt.contract.program import ArgKind, Capabilities, Dtype, KernelImage
from maia_rt.errors import ProgramError
from maia_rt.kernels.blocking import Span, blocks, halvings, largest, pipelined, shares
from maia_rt.kernels.builder import KernelBuilder
from maia_rt.kernels.tile import SRAM_ALIGNMENT, TileBuilder
from maia_rt.kernels.view import WIDTHS, View


@dataclass(frozen=True)
class Group:
    """What is worked on at one time: these heads of these sequences, for these of their queries."""

    heads: Span
    sequences: Span
    queries: Span

    @property
    def extents(self) -> tuple[int, int, int]:
        """Heads, sequences, queries."""
        return (self.heads[1] - self.heads[0], self.sequences[1] - self.sequences[0], self.queries[1] - self.queries[0])


def attention(capabilities: Capabilities, sequences: int, length: int, heads: int, head_size: int, *,
              dtype: Dtype = Dtype.FP32, name: str = "attention") -> KernelImage:
    """``softmax(q @ k.T / sqrt(head size)) @ v`` for each head of each sequence, with padding masked out.

    Parameters
    ----------
    capabilities : Capabilities
        Of the device.
    sequences, length : int
        Tokens are numbered sequence by sequence; each sequence is padded to ``length``.
    heads, head_size : int
        A token's query is ``heads`` rows of ``head_size`` side by side; its key and value likewise.
    dtype : Dtype
        Of every argument; scores and probabilities are FP32.
    name : str
        Of the kernel.

    Returns
    -------
    KernelImage
        Arguments qkv (tokens, 3 * heads * head size), mask (sequences, length), not 0 where there is a token,
        y (tokens, heads * head size) (out). A sequence without a token gives zeros.

    Raises
    ------
    ProgramError
        SRAM does not hold one query's scores and one head's keys and values, twice.
    """
    builder = KernelBuilder(name, capabilities)
    tokens = sequences * length
    qkv = builder.argument("qkv", ArgKind.IN, dtype, (tokens, 3 * heads * head_size))
    mask = builder.argument("mask", ArgKind.IN, dtype, (sequences, length))
    y = builder.argument("y", ArgKind.OUT, dtype, (tokens, heads * head_size))
    # (which, head, sequence, token, element)
    split = qkv.split(1, (3, heads, head_size)).split(0, (sequences, length)).permute(2, 3, 0, 1, 4)
    merged = y.split(1, (heads, head_size)).split(0, (sequences, length)).permute(2, 0, 1, 3)
    head_spans, sequence_spans = _grid(capabilities.tiles, heads, sequences)
    number = 0
    for head_span in head_spans:
        for sequence_span in sequence_spans:
            groups = _groups(capabilities.tile_sram_bytes, head_span, sequence_span, length, head_size, WIDTHS[dtype],
                             name)
            _write_share(builder.tile(number), groups, split, mask, merged)
            number += 1
    return builder.build()


def _grid(tiles: int, heads: int, sequences: int) -> tuple[list[Span], list[Span]]:
    """Spans of heads and of sequences for the tiles, such that the busiest tile has the least to do."""
    best = min(range(1, tiles + 1), key=lambda parts: (-(-heads // parts)) * -(-sequences // (tiles // parts)))
    return shares(heads, best), shares(sequences, tiles // best)


def _groups(sram_bytes: int, heads: Span, sequences: Span, length: int, head_size: int, width: int,
            name: str) -> list[Group]:
    """The largest groups that SRAM holds twice, so that one is brought in while another is worked on."""
    most_heads, most_sequences = heads[1] - heads[0], sequences[1] - sequences[0]
    choices = [(h, s, length) for h in halvings(most_heads) for s in halvings(most_sequences)]
    choices += [(1, 1, q) for q in halvings(length)[1:]]
    fitting = [c for c in choices if 2 * _group_bytes(*c, length, head_size, width) <= sram_bytes]
    if not fitting:
        raise ProgramError(f"kernel {name!r}: one query over {length} tokens does not fit into SRAM",
                           cause=f"a tile has {sram_bytes} bytes")
    h, s, q = max(fitting, key=lambda c: (c[0] * c[1] * c[2], c[0]))
    return [Group(a, b, c) for b in blocks(*sequences, s) for a in blocks(*heads, h) for c in blocks(0, length, q)]


def _group_bytes(heads: int, sequences: int, queries: int, length: int, head_size: int, width: int) -> int:
    planes = heads * sequences
    return (planes * (queries + 2 * length) * head_size * width + planes * queries * (length * 4 + head_size * width)
            + planes * length * width + 6 * SRAM_ALIGNMENT)


def _write_share(tile: TileBuilder, groups: list[Group], split: View, mask: View, merged: View) -> None:
    """One tile's heads and sequences."""
    length, head_size = split.shape[3:]
    planes = max(g.extents[0] * g.extents[1] for g in groups)
    queries = largest([g.queries for g in groups])
    dtype = split.dtype
    query_ring = tile.ring(2, (planes * queries * head_size,), dtype)
    key_ring = tile.ring(2, (planes, length, head_size), dtype)
    value_ring = tile.ring(2, (planes, length, head_size), dtype)
    mask_ring = tile.ring(2, (planes, length), dtype)
    score_ring = tile.ring(2, (planes * queries * length,), Dtype.FP32)
    result_ring = tile.ring(2, (planes * queries * head_size,), dtype)

    def load(group: Group) -> tuple[View, View, View]:
        h, s, q = group.extents
        heads, sequences = slice(*group.heads), slice(*group.sequences)
        query = query_ring.take()[: h * s * q * head_size]
        key = key_ring.take()[: h * s]
        value = value_ring.take()[: h * s]
        keep = mask_ring.take()[: h * s]
        tile.move(query.split(0, (h, s, q, head_size)), split[0, heads, sequences, slice(*group.queries)])
        tile.move(key.split(0, (h, s)), split[1, heads, sequences])
        tile.move(keep.split(0, (h, s)), mask[sequences])
        tile.move(value.split(0, (h, s)), split[2, heads, sequences])
        scores = score_ring.take()[: h * s * q * length].split(0, (h * s, q, length))
        tile.matmul(scores, query.split(0, (h * s, q, head_size)), key, transpose_b=True)
        return scores, keep, value

    def run(group: Group, loaded: tuple[View, View, View]) -> None:
        h, s, q = group.extents
        scores, keep, value = loaded
        tile.softmax(scores, scores, 1.0 / math.sqrt(head_size), keep.split(0, (h * s, 1)))
        result = result_ring.take()[: h * s * q * head_size]
        tile.matmul(result.split(0, (h * s, q, head_size)), scores, value)
        tile.move(merged[slice(*group.heads), slice(*group.sequences), slice(*group.queries)],
                  result.split(0, (h, s, q, head_size)))

    pipelined(groups, load, run)
