# SPDX-License-Identifier: Apache-2.0
"""The command `stlm`, without what `import modeling_stlm` costs: it registers classes with transformers, and so imports torch.

A package of its own, because importing any part of `modeling_stlm` runs its `__init__.py` first. Here an empty module with
the same folder stands in its place, in the process of the command only.
"""

import sys
from types import ModuleType


def stand_in() -> ModuleType:
    # `importlib.util.find_spec`, without its import.
    spec = next(spec for finder in sys.meta_path if (spec := finder.find_spec("modeling_stlm", None)))
    package = ModuleType("modeling_stlm")
    package.__path__ = spec.submodule_search_locations
    return package


def main() -> int:
    if "modeling_stlm" not in sys.modules:
        sys.modules["modeling_stlm"] = stand_in()
    try:
        from modeling_stlm.inference.cli import main

        return main()
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
