"""Every registered policy and codec, in small, by name: what tests take that go over all of them.

Names are those of the classes; further examples of a class have what differs behind it. What a test must know of a
policy or codec beyond its settings (an oracle, a bound) stands where it is used.
"""

import dataclasses

import kvattn
from kvattn import codecs, errors, policies


def _examples(entries):
    """Examples by name."""
    found = {}
    for entry in entries:
        for example in entry.examples:
            fields = [
                (getattr(entry.examples[0], f.name), getattr(example, f.name)) for f in dataclasses.fields(example)
            ]
            found["-".join([entry.kind.__name__, *(str(new) for first, new in fields if new != first)])] = example
    return found


POLICIES = _examples(policies.registered())
CODECS = _examples(entry for entry in codecs.registered() if entry.kind is not codecs.Plain)
"""Without `Plain`, which is what caches have that are given none."""


def name(part):
    """The name of one of them, of another policy or codec that of its class."""
    return next((n for n, x in (*POLICIES.items(), *CODECS.items()) if x == part), type(part).__name__)


def capacity_of(policy, most):
    """`capacity` of a cache for so many tokens: None where the policy bounds what it keeps."""
    try:
        policy.num_slots(None)
    except errors.ConfigError:
        return most
    return None


def go_together(policy, codec):
    """Whether a cache can have both."""
    return codec is None or codec.refuses(policy.in_order) is None


def with_tokens(policy):
    """The policy, looking at token ids if it can: 0 is special, 1 and 2 are punctuation."""
    if not isinstance(policy, kvattn.FastGen):
        return policy
    return dataclasses.replace(policy, special_tokens=(0,), punctuation_tokens=(1, 2))
