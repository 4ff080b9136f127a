"""The accuracy rule: no fixed tolerance, the error of an honest low-precision computation is the measure."""

import numpy as np

from kvattn._typing import AnyArray


def inaccuracy(out: AnyArray, ref64: np.ndarray, lowp_ref: AnyArray, mean: float = 1.5) -> str | None:
    """What the accuracy rule says against an output; None: nothing.

    ``max|out - ref64| <= 2 max|lowp - ref64| + 2 max|(ref + 0.3 - 0.3) - ref|``, with ref in the dtype of `out`: the
    second term is what rounding alone does. The mean of the error likewise, with `mean` in place of 2.

    Args:
        out: [...] what is judged, in the dtype it was computed in.
        ref64: [...] the truth, in float64.
        lowp_ref: [...] the same computed honestly in low precision (`attend_token` with that dtype).
        mean: factor of the mean error of `lowp_ref`.

    Example:
        >>> import numpy as np
        >>> truth = np.array([1.0, 2.0, 3.0])
        >>> honest = truth.astype(np.float32).astype(np.float64) + 1e-7
        >>> inaccuracy(truth.astype(np.float32), truth, honest)
        >>> inaccuracy((truth + 1e-3).astype(np.float32), truth, honest)
        'max error 0.001 > 3.19e-07'
    """
    out = np.asarray(out)
    wide, lowp_ref = out.astype(np.float64), np.asarray(lowp_ref, np.float64)
    if wide.shape != ref64.shape:
        return f"shape {wide.shape}, expected {ref64.shape}"
    if not wide.size:
        return None
    if not np.isfinite(wide).all():
        return "the output is not finite"
    ref = ref64.astype(out.dtype)
    # Scalars of bfloat16 stay bfloat16 only if the constant is one too.
    shift = np.asarray(0.3, out.dtype)
    floor = np.abs(((ref + shift) - shift).astype(np.float64) - ref.astype(np.float64))
    error, low = np.abs(wide - ref64), np.abs(lowp_ref - ref64)
    bound = 2 * low.max() + 2 * floor.max()
    if error.max() > bound:
        return f"max error {error.max():.3g} > {bound:.3g}"
    bound = mean * low.mean() + 2 * floor.mean()
    if error.mean() > bound:
        return f"mean error {error.mean():.3g} > {bound:.3g}"
    return None


def assert_accurate(out: AnyArray, ref64: np.ndarray, lowp_ref: AnyArray, mean: float = 1.5) -> None:
    """`inaccuracy` as an assertion: of an output [...], the truth and an honest low-precision computation.

    Raises:
        AssertionError: the output is not finite, or further from the truth than the rule allows.
    """
    _fail(inaccuracy(out, ref64, lowp_ref, mean))


def assert_lse(lse: AnyArray, ref64: np.ndarray, rtol: float = 1e-5) -> None:
    """float32 logsumexp [...]: equal to 1e-5, and -inf exactly where the truth is.

    Raises:
        AssertionError: it is not.
    """
    lse = np.asarray(lse, np.float64)
    empty = np.isneginf(ref64)
    if (np.isneginf(lse) != empty).any():
        _fail("lse is -inf in other places than where nothing is attended to")
    error = np.abs(lse[~empty] - ref64[~empty]) / np.maximum(np.abs(ref64[~empty]), 1)
    if error.size and not error.max() <= rtol:
        _fail(f"lse is off by {error.max():.3g}, relatively")


def assert_same_bits(a: AnyArray, b: AnyArray, what: str = "arrays") -> None:
    """Two arrays [...] are equal bit by bit, NaN and the sign of zero included.

    Raises:
        AssertionError: they are not; the message begins with `what`.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != b.dtype or a.shape != b.shape:
        _fail(f"{what}: {a.dtype}{a.shape} and {b.dtype}{b.shape}")
    if a.tobytes() != b.tobytes():
        _fail(f"{what} differ in {int((a != b).sum())} of {a.size} numbers")


def _fail(message: str | None) -> None:
    if message is not None:
        raise AssertionError(message)
