# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


ROOT = Path(__file__).parent


def read_version() -> str:
    for line in (ROOT / "modeling_stlm" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("modeling_stlm/__init__.py has no __version__")


class BuildLibrary(build_ext):
    """The engine is a C library without Python in it: loaded with `ctypes`, it exports no `PyInit`."""

    def get_export_symbols(self, ext):
        return []


# Sums must not be fused with products: results are the same on every CPU. Python's own flags have -fwrapv, with which the
# loops take 1.3 to 1.5 times as long.
FLAGS = "-std=c99 -O3 -fno-wrapv -ffp-contract=off -fvisibility=hidden -g0 -Wno-psabi".split()
ENGINE = Extension(
    "modeling_stlm.inference._stlm",
    ["modeling_stlm/inference/stlm.c", "modeling_stlm/inference/zip.c"],
    depends=["modeling_stlm/inference/stlm.h"],
    extra_compile_args=[] if sys.platform == "win32" else FLAGS,
    py_limited_api=True,
    optional=True,  # without a C compiler, everything else is installed
)

setup(
    name="stlm",
    version=read_version(),
    description="Super Tiny Language Models: pooled byte-level transformers for the Hugging Face ecosystem",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        "modeling_stlm",
        "modeling_stlm.training",
        "modeling_stlm.inference",
        "stlm_command",
        "tokenization_stlm",
    ],
    package_dir={"stlm_command": "modeling_stlm/inference/stlm_command", "tokenization_stlm": "tokenization"},
    package_data={"modeling_stlm": ["presets/*.json"]},
    ext_modules=[ENGINE],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    entry_points={"console_scripts": ["stlm = stlm_command:main"]},
    install_requires=["torch>=2.11", "transformers>=5.24,<6", "numpy"],
    extras_require={
        "train": [
            "accelerate>=1.15",
            "datasets>=4.7",
            "evaluate>=0.4",
            "matplotlib>=3.9",
            "peft>=0.20",
            "scikit-learn>=1.5",
            "sentence-transformers>=6",
            "trl>=1.16",
        ],
        "eval": ["lm_eval[hf]>=0.4.13"],
        "serve": ["transformers[serving]"],
        "export": ["onnx>=1.19", "onnxruntime>=1.23", "onnxscript>=0.7.2"],
        "engine": ["gguf>=0.19"],  # to write its files; running them needs nothing
        "executorch": ["executorch>=1.5"],  # its wheels fit one release of torch
        "test": [
            "hypothesis>=6.130",
            "optuna>=4",
            "parameterized>=0.9",
            "pytest>=9",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "torchao>=0.18",
        ],
        "style": ["ruff==0.17.5"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
