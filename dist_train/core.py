"""The native core, _native.c, as it was built for these sources; `native` is None where there is none, and `missing` says why."""

CORE_VERSION = 2  # as in _native.c: raise both when a function there takes or gives something else
try:
    from dist_train import _native as native

    if getattr(native, "CORE_VERSION", 0) != CORE_VERSION:
        raise ImportError("the one that is there was built from other sources than these")
    missing = ""
except ImportError as error:
    native, missing = None, str(error)
