# SPDX-License-Identifier: Apache-2.0
"""The command `stlm`, without what `import modeling_stlm` costs: it registers classes with transformers, and so imports torch.

A package of its own, because importing any part of `modeling_stlm` runs its `__init__.py` first. The folder `inference` is
here a package of another name, and the one that it has stays free for the package itself.
"""

import os
import sys
from types import ModuleType


NAME = "_stlm_inference"


def register() -> None:
    # `importlib.util.find_spec`, without its import.
    spec = next(spec for finder in sys.meta_path if (spec := finder.find_spec("modeling_stlm", None)))
    package = ModuleType(NAME)
    package.__path__ = [os.path.join(folder, "inference") for folder in spec.submodule_search_locations]
    sys.modules[NAME] = package


def main() -> int:
    register()
    try:
        from _stlm_inference.cli import main

        return main()
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
