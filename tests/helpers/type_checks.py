"""The type checks that the suite runs under, in a third of jaxtyping's time.

`--jaxtyping-packages=rmtension,beartype.beartype` puts `jaxtyping.jaxtyped` on every function of the library. It binds
all arguments, remembers their shapes, and checks them in two more functions. Where no annotation has a shape, the type
checker by itself checks the same.
"""

import inspect
from types import FunctionType

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker):
    def decorate(found):
        notes = getattr(found, "__annotations__", {}).values()
        # Shapes are in quotes, and so are names of what is defined later, of which jaxtyping takes care too.
        has_quotes = any("'" in inspect.formatannotation(note) for note in notes)
        if isinstance(found, FunctionType) and not has_quotes:
            return typechecker(found)
        return _jaxtyped(found, typechecker=typechecker)

    return decorate


jaxtyping.jaxtyped = _checked
