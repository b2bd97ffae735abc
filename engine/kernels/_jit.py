"""The one door to Numba: how kernels are compiled and where their machine code is kept.

Flags live here only. Every kernel is compiled without fast-math: nothing that feeds a score may be
reassociated or contracted by the compiler, a fused multiply-add is written out (`engine.kernels.simd.fma`),
denormals are kept.

Where it is kept: `engine.kernel_cache`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
from numba import types
from numba.core import event
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from engine.kernel_cache import ENGINE, cache_dir, sources_digest


class _Locator(_CacheLocator):
    """Places a kernel's code by its module's path in the package; stamped with the digest of all sources."""

    def __init__(self, function: Callable[..., Any], source: str) -> None:
        self._line = function.__code__.co_firstlineno
        module = Path(source).resolve().relative_to(ENGINE).with_suffix("")
        self._path = str(Path(cache_dir() or os.devnull) / "-".join(module.parts))

    def get_cache_path(self) -> str:
        return self._path

    def get_source_stamp(self) -> str:
        return sources_digest()

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, function: Callable[..., Any], source: str) -> _Locator:
        locator = cls(function, source)
        locator.ensure_cache_path()
        return locator


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):
    """Numba's, with one process at a time writing.

    A name for new code is the first that a kernel's index lacks; of two processes that compile two signatures
    at once, the one would take the other's name and later load its code.
    """

    _impl_class = _CacheImpl

    def save_overload(self, sig: Any, data: Any) -> None:
        with (Path(self.cache_path) / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            super().save_overload(sig, data)


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a kernel on its first call: no GIL, no fast-math, division as NumPy does it.

    The machine code of the engine's own kernels is kept on disk; a kernel written elsewhere (a test's) is
    not.
    """
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    ours = ENGINE in Path(function.__code__.co_filename).resolve().parents
    if ours and cache_dir() is not None and not numba.config.DISABLE_JIT:
        dispatcher._cache = _Cache(dispatcher.py_func)
    template_of = dispatcher.get_call_template

    def template_of_plain(
        arguments, keywords
    ):  # a constant argument would be a type, and a compilation, of its own
        return template_of([types.unliteral(argument) for argument in arguments], keywords)

    dispatcher.get_call_template = template_of_plain
    return dispatcher


def named_kernel(template: Callable[..., Any], name: str, **names: Any) -> Any:
    """A kernel with the code of `template` under another name, where `names` are found among its globals.

    Kernels that differ only in the intrinsic they call need no function each; a closure instead of a global
    would keep them out of the disk cache.
    """
    code = template.__code__.replace(co_name=name, co_qualname=name)
    function = FunctionType(code, template.__globals__ | names, name)
    function.__module__, function.__doc__ = template.__module__, template.__doc__
    return kernel(function)


class CompileTimer:
    """Adds up the seconds that Numba spends compiling (not loading from disk) while the context is open."""

    seconds = 0.0

    def __enter__(self) -> CompileTimer:
        self._recorder = event.RecordingListener()
        event.register("numba:compile", self._recorder)
        return self

    def __exit__(self, *exc: object) -> None:
        event.unregister("numba:compile", self._recorder)
        depth, begun = 0, 0.0
        for at, item in self._recorder.buffer:  # nested compilations lie inside their caller's time
            if item.is_start:
                begun = at if depth == 0 else begun
                depth += 1
            else:
                depth -= 1
                self.seconds += at - begun if depth == 0 else 0.0
