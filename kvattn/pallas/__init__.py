"""Kernels for the memory-bound decode step, written in Pallas.

`kvattn.cached_attention` takes them by itself where they run. `decode_attention` and `paged_decode_attention` call them
on plain arrays. Importing this package registers the kernels; none is loaded before it is wanted.
"""

from kvattn.pallas import compat as compat
from kvattn.pallas import kernels as kernels
from kvattn.pallas import tuning as tuning
from kvattn.pallas.interpreter import ahead_of_time as ahead_of_time
from kvattn.pallas.interpreter import interpret as interpret
from kvattn.pallas.on_arrays import decode_attention as decode_attention
from kvattn.pallas.on_arrays import paged_decode_attention as paged_decode_attention

__all__ = ["ahead_of_time", "compat", "decode_attention", "interpret", "kernels", "paged_decode_attention", "tuning"]
