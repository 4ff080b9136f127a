"""What `pytest --shapes` checks annotations with."""

from typing import Self

import beartype

typechecker = beartype.beartype(
    # `Self` means something in classes that are decorated as a whole only, and these are decorated method by method.
    conf=beartype.BeartypeConf(
        hint_overrides=beartype.FrozenDict({Self: object}),
        is_pep484_tower=True,  # an int will do for a float
    )
)
