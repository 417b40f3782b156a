"""When imported, takes out of Triton's interpreter what costs half of its time and shows nothing.

That is the sums taken once more in 64 bits to see whether they overflow, whose result is dropped
unless Triton debugs; putting its functions in the place of the language's at every call of a
function by a kernel, where once for each module of functions is enough; and making a table of
NumPy's types for every look into it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

numpy_type = interpreter._get_np_dtype
numpy_type_of_scalar = functools.cache(numpy_type)
launch = interpreter.InterpretedFunction.run
prepared: set[str] = set()  # modules whose functions the running kernel has called


def known_numpy_type(kind: Any) -> Any:
    """Look up NumPy's name of a type; those of pointers cannot be keys."""
    if isinstance(kind.scalar, tl.pointer_type):
        return numpy_type(kind.scalar)
    return numpy_type_of_scalar(kind.scalar)


def run(self: Any, *args: Any, **options: Any) -> Any:
    """Launch a kernel, whose end takes out again some of what was put in."""
    prepared.clear()
    return launch(self, *args, **options)


def call(self: Any, *args: Any, **options: Any) -> Any:
    """Call a function of the kernel that runs."""
    if self.fn.__module__ not in prepared:
        interpreter._patch_lang(self.fn)
        prepared.add(self.fn.__module__)
    try:
        return self.rewrite()(*args, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


if triton.knobs.runtime.interpret:
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)
    interpreter._get_np_dtype = known_numpy_type
    interpreter.InterpretedFunction.run = run
    interpreter.InterpretedFunction.__call__ = call
