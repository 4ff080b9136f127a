"""Modules with a fault in them, for tests that show that they would see it."""

import inspect
import types


def planted(module, right, wrong):
    """The module with a part of its source replaced."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, f"{source.count(right)} times: {right}"
    faulty = types.ModuleType(module.__name__ + "_with_fault")
    faulty.__dict__.update(__name__=module.__name__, __file__=module.__file__)
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), faulty.__dict__)
    return faulty
