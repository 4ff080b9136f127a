"""The policies that are known by name."""

from kvattn._registry import Registry
from kvattn.policies.base import Policy

POLICIES = Registry("policy", Policy)
register, registered = POLICIES.register, POLICIES.registered
