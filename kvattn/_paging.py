"""How many pages tokens take. One rule for the caches, the host that allocates pages, and the planner; without JAX."""


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that so many tokens take."""
    return -(-num_tokens // page_size)


def pages_at_once(
    length: int, page_size: int, *, slots: int | None = None, window: int | None = None, chunk: int = 1
) -> int:
    """The most pages that a sequence holds at once while it grows to `length` tokens.

    Where slots are used again: those of all slots. Where a window leaves its pages behind: those that a query can see,
    wherever they begin, and those of the tokens that come with it.

    Args:
        length: tokens.
        page_size: R, tokens of a page.
        slots: C, where slots are used again. None: each token takes one of its own.
        window: tokens a query sees, its own included, where pages that have fallen out of it are given back. None: all
            are kept.
        chunk: tokens that come at a time, which take their pages before others are given back.
    """
    pages = pages_for(length if slots is None else min(length, slots), page_size)
    if window is None:
        return pages
    return min(pages, pages_for(window - 1 + chunk - 1, page_size) + 1)
