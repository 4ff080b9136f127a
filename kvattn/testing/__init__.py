"""Oracles and probes that check anybody's decoding cache, kvattn's own or another library's."""

from kvattn.testing.accuracy import assert_accurate as assert_accurate
from kvattn.testing.accuracy import assert_lse as assert_lse
from kvattn.testing.accuracy import assert_same_bits as assert_same_bits
from kvattn.testing.accuracy import inaccuracy as inaccuracy
from kvattn.testing.check import check_cache as check_cache
from kvattn.testing.claims import Claims as Claims
from kvattn.testing.oracles import TokenLists as TokenLists
from kvattn.testing.oracles import attend_token as attend_token
from kvattn.testing.probes import attention_weights as attention_weights
from kvattn.testing.report import Call as Call
from kvattn.testing.report import Finding as Finding
from kvattn.testing.report import Report as Report
from kvattn.testing.trial import Plan as Plan
from kvattn.testing.trial import Trial as Trial

__all__ = [
    "Call",
    "Claims",
    "Finding",
    "Plan",
    "Report",
    "TokenLists",
    "Trial",
    "assert_accurate",
    "assert_lse",
    "assert_same_bits",
    "attend_token",
    "attention_weights",
    "check_cache",
    "inaccuracy",
]
