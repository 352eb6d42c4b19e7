"""Masks of block diffusion: order between blocks of positions, full attention within (Arriola et
al. 2025, section 3.1)."""

import dataclasses

import kernels_pallas


@dataclasses.dataclass(frozen=True)
class BlockCausal(kernels_pallas.Mask):
    """k // block <= q // block: a query sees its own block and those before it."""

    block: int

    def allowed(self, q_ids, k_ids):
        return k_ids // self.block <= q_ids // self.block

    def key_range(self, q_start: int, q_stop: int, kv_length: int) -> tuple[int, int]:
        return 0, min(((q_stop - 1) // self.block + 1) * self.block, kv_length)

    def block_kind(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> str:
        first, last = _blocks(q_start, q_stop, self.block)
        return _kind_before(first + 1, last + 1, *_blocks(k_start, k_stop, self.block))


@dataclasses.dataclass(frozen=True)
class TwoStreams(kernels_pallas.Mask):
    """For a row of noisy tokens followed by the same tokens without noise.

    A noisy token sees the noisy tokens of its block and the clean ones of earlier blocks; a clean
    token sees the clean ones of its own and earlier blocks. One pass thus denoises every block,
    each given the clean text before it (Arriola et al. 2025, appendix B.6).

    Attributes:
      length: tokens of each of the two halves; a multiple of `block`.
      block: tokens of a block.
    """

    length: int
    block: int

    def allowed(self, q_ids, k_ids):
        q_noisy, k_noisy = q_ids < self.length, k_ids < self.length
        q_block = q_ids % self.length // self.block
        k_block = k_ids % self.length // self.block
        same = q_block == k_block
        of_clean = (k_block < q_block) | (same & ~q_noisy)
        return (k_noisy & q_noisy & same) | (~k_noisy & of_clean)

    def key_range(self, q_start: int, q_stop: int, kv_length: int) -> tuple[int, int]:
        n, block = self.length, self.block
        if q_start >= n:
            start, stop = n, n + ((q_stop - 1 - n) // block + 1) * block
        else:
            start, last = q_start // block * block, min(q_stop, n) - 1
            stop = n + last // block * block if last >= block else block
            stop = stop if q_stop <= n else 2 * n
        return min(start, kv_length), min(stop, kv_length)

    def block_kind(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> str:
        n = self.length
        if q_start < n < q_stop or k_start < n < k_stop:
            return "partial"
        q_clean, k_clean = q_start >= n, k_start >= n
        first, last = _blocks(q_start - n * q_clean, q_stop - n * q_clean, self.block)
        keys = _blocks(k_start - n * k_clean, k_stop - n * k_clean, self.block)
        if k_clean:
            return _kind_before(first + q_clean, last + q_clean, *keys)
        if q_clean or keys[0] > last or keys[1] < first:
            return "skipped"
        return "full" if first == last == keys[0] == keys[1] else "partial"


def _blocks(start: int, stop: int, block: int) -> tuple[int, int]:
    """The first and the last block of the positions [start, stop)."""
    return start // block, (stop - 1) // block


def _kind_before(first: int, last: int, k_first: int, k_last: int) -> str:
    """Of queries that see the blocks before one between `first` and `last`."""
    if k_first >= last:
        return "skipped"
    return "full" if k_last < first else "partial"
