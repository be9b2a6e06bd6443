"""The optional native decoder: built where a C compiler and libjpeg-turbo's header are found, left out elsewhere."""

import os

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class OptionalBuild(build_ext):
    """Adds the checksum where xxhash.h is found; without it Python's xxhash package computes the same."""

    def build_extension(self, extension):
        if self._has_xxh3():
            extension.define_macros.append(("HAVE_XXHASH", "1"))
        self.force = True  # other headers of the system, flags or another compiler make another core of the same sources
        super().build_extension(extension)

    def _has_xxh3(self) -> bool:
        """Whether xxhash.h is there, and XXH3 in it gives the values that it has given since 0.8.0."""
        os.makedirs(self.build_temp, exist_ok=True)
        probe = os.path.join(self.build_temp, "probe.c")
        with open(probe, "w") as file:
            file.write("#define XXH_INLINE_ALL\n#include <xxhash.h>\n#if XXH_VERSION_NUMBER < 800\n#error too old\n#endif\n")
        try:
            self.compiler.compile([probe], output_dir=self.build_temp)
        except Exception:  # each compiler class raises its own
            return False
        return True


# no contraction: the weights must round as Pillow's do, also where the processor could fuse the operations
flags = [] if os.name == "nt" else ["-O3", "-ffp-contract=off", "-fvisibility=hidden"]
native = Extension(
    "dist_train._native",
    ["dist_train/_native.c", "dist_train/_baseline.c"],
    depends=[f"dist_train/{name}.h" for name in ("_baseline", "_codes", "_hash", "_jpeg", "_resize", "_samples")],
    libraries=["jpeg"],
    extra_compile_args=flags,
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": OptionalBuild})
