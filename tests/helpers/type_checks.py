"""The type checks that the suite runs under, in a third of jaxtyping's time.

`--jaxtyping-packages=rmtension,beartype.beartype` decorates every function of the library with `jaxtyping.jaxtyped`,
which binds all arguments, records their shapes, and checks them in two more functions. If no annotation of a function
has a shape, the type checker alone checks the same.
"""

import inspect
from types import FunctionType

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker):
    def decorate(decorated):
        notes = getattr(decorated, "__annotations__", {}).values()
        # Shapes are in quotes. So are names that are defined later, which jaxtyping also resolves.
        has_quotes = any("'" in inspect.formatannotation(note) for note in notes)
        if isinstance(decorated, FunctionType) and not has_quotes:
            return typechecker(decorated)
        return _jaxtyped(decorated, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = _checked
