# SPDX-License-Identifier: Apache-2.0
"""Data sets of the tasks beside this file. lm_eval hands over its metadata, where the paths of the files are."""

from datasets import DatasetDict, load_dataset
from lm_eval.tasks.hellaswag.utils import process_docs as process_hellaswag


__all__ = ["blimp", "hellaswag", "process_hellaswag"]


def blimp(blimp_file: str, **metadata) -> DatasetDict:
    return load_dataset("json", data_files={"test": blimp_file})


def hellaswag(hellaswag_file: str, **metadata) -> DatasetDict:
    return load_dataset("json", data_files={"test": hellaswag_file})
