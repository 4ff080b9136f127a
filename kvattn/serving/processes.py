"""The processes of a JAX program, and the store by which they reach each other: that of `jax.distributed`."""

import itertools

import jax
from jax._src import distributed  # the store has no public name
from jax.sharding import AbstractMesh, Mesh

from kvattn.errors import ConfigError
from kvattn.serving.peers import Peers

_ENGINES = itertools.count()
"""Engines that were made over several processes: every process makes the same ones, in the same order."""


class DistributedStore:
    """The store of `jax.distributed`, which process 0 keeps."""

    def __init__(self):
        client = distributed.global_state.client
        if client is None:
            raise ConfigError(
                "the mesh has devices of other processes: call jax.distributed.initialize() before anything else."
            )
        self._client = client

    def put(self, name: str, value: bytes) -> None:
        """See `Store.put`."""
        try:
            self._client.key_value_set_bytes(name, value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError as error:
            raise ConnectionError(str(error)) from error

    def get(self, name: str, seconds: float) -> bytes | None:
        """See `Store.get`."""
        try:
            if seconds <= 0:
                return self._client.key_value_try_get_bytes(name)
            return self._client.blocking_key_value_get_bytes(name, max(int(seconds * 1000), 1))
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
                return None
            raise ConnectionError(str(error)) from error

    def drop(self, name: str) -> None:
        """See `Store.drop`."""
        try:
            self._client.key_value_delete(name)
        except jax.errors.JaxRuntimeError as error:
            raise ConnectionError(str(error)) from error


def peers_of(mesh: Mesh | AbstractMesh | None, timeout: float) -> Peers | None:
    """The processes whose devices a mesh has; None: all are of this one.

    Raises:
        ConfigError: a mesh that leaves processes out.
    """
    if not isinstance(mesh, Mesh):
        return None
    numbers = sorted({device.process_index for device in mesh.devices.flat})
    if numbers == [jax.process_index()]:
        return None
    if numbers != list(range(jax.process_count())):
        raise ConfigError(
            f"the mesh has devices of processes {numbers}, there are {jax.process_count()}: an engine over several "
            "processes needs all of them."
        )
    return Peers(DistributedStore(), jax.process_index(), jax.process_count(), timeout, f"kvattn/{next(_ENGINES)}")
