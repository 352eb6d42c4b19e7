"""Causal masks that leave out most of the earlier tokens."""

import dataclasses

import kernels_pallas


@dataclasses.dataclass(frozen=True)
class Dilated(kernels_pallas.Mask):
    """k = q - i step with 0 <= i <= count: a query sees itself and every step-th token before it.

    The dilated window of Beltagy et al. 2020, section 3.1; without `count`, the strided pattern of
    Child et al. 2019, equation 3.

    Attributes:
      step: distance of the tokens that are seen.
      count: how many of them there are before the query; None for all.
    """

    step: int
    count: int | None = None

    def __post_init__(self):
        if self.step < 1 or (self.count or 0) < 0:
            raise ValueError(f"{self}: step must be at least 1, and count not negative")

    def allowed(self, q_ids, k_ids):
        back = q_ids - k_ids
        seen = (back >= 0) & (back % self.step == 0)
        return seen if self.count is None else seen & (back // self.step <= self.count)

    def key_range(self, q_start: int, q_stop: int, kv_length: int) -> tuple[int, int]:
        start = 0 if self.count is None else max(q_start - self.step * self.count, 0)
        stop = min(q_stop, kv_length)
        return min(start, stop), stop

    def block_kind(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> str:
        first, _ = self.key_range(q_start, q_stop, k_stop)
        return "skipped" if k_start >= q_stop or k_stop <= first else "partial"

    def shifted(self, by: int) -> "Dilated":
        return self


@dataclasses.dataclass(frozen=True)
class BlockSparse(kernels_pallas.Mask):
    """k <= q in blocks of positions: a query sees its own block, those near it, and some others.

    It sees the `near` blocks before its own, and of all earlier ones those whose number is a
    multiple of `stride`: every later query can read them (the fixed pattern of Child et al. 2019,
    equation 4, in whole blocks, which kernels skip).

    Attributes:
      block: positions of a block.
      near: blocks before its own that a query sees.
      stride: distance between the blocks that every later query sees.
    """

    block: int
    near: int
    stride: int

    def __post_init__(self):
        if min(self.block, self.stride) < 1 or self.near < 0:
            raise ValueError(f"{self}: block and stride must be at least 1, and near not negative")

    def allowed(self, q_ids, k_ids):
        q_block, k_block = q_ids // self.block, k_ids // self.block
        return (k_ids <= q_ids) & ((q_block - k_block <= self.near) | (k_block % self.stride == 0))

    def key_range(self, q_start: int, q_stop: int, kv_length: int) -> tuple[int, int]:
        return 0, min(q_stop, kv_length)

    def block_kind(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> str:
        if k_start >= q_stop:
            return "skipped"
        first, last = q_start // self.block, (q_stop - 1) // self.block
        blocks = range(k_start // self.block, (k_stop - 1) // self.block + 1)
        far = [k for k in blocks if k % self.stride]  # those that not every query sees
        if len(far) == len(blocks) and all(first - k > self.near for k in far):
            return "skipped"
        seen = all(last - k <= self.near for k in far)
        return "full" if seen and k_stop - 1 <= q_start else "partial"
