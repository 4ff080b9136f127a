"""What a pool of blocks holds, shares and wastes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a pool holds at one moment.

    Attributes:
        num_blocks: blocks of the pool.
        free_blocks: those nobody holds.
        used_blocks: those of sequences, each counted once however many share it.
        held_blocks: those that only `BlockPool.hold` keeps (prefixes nobody reads now, copies in flight).
        table_entries: blocks that all tables name together; without sharing they would take so many.
        tokens: tokens in `used_blocks`, each counted once.
        block_size: tokens per block.
        peak_blocks: the most blocks that were taken at once, so far.
    """

    num_blocks: int
    free_blocks: int
    used_blocks: int
    held_blocks: int
    table_entries: int
    tokens: int
    block_size: int
    peak_blocks: int

    @property
    def waste(self) -> float:
        """Share of the slots in `used_blocks` that hold no token: the ends of last blocks.

        Sequences of mean length L waste ((R - 1) / 2) / (L + (R - 1) / 2) with blocks of R.
        """
        return 1 - self.tokens / (self.used_blocks * self.block_size) if self.used_blocks else 0.0

    @property
    def saved(self) -> float:
        """Blocks saved by sharing, as a share of what would be taken without."""
        return 1 - self.used_blocks / self.table_entries if self.table_entries else 0.0
