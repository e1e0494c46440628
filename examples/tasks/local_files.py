# SPDX-License-Identifier: Apache-2.0
"""Data sets of the tasks beside this file. lm_eval hands over its metadata, where the paths of the files are."""

from functools import partial

from datasets import DatasetDict, load_dataset
from lm_eval.tasks.hellaswag.utils import process_docs as process_hellaswag


__all__ = ["arc_challenge", "arc_easy", "blimp", "copa", "hellaswag", "openbookqa", "piqa", "process_hellaswag"]


def _load(task: str, **metadata) -> DatasetDict:
    return load_dataset("json", data_files={"test": metadata[f"{task}_file"]})


blimp = partial(_load, "blimp")
hellaswag = partial(_load, "hellaswag")
arc_easy = partial(_load, "arc_easy")
arc_challenge = partial(_load, "arc_challenge")
openbookqa = partial(_load, "openbookqa")
copa = partial(_load, "copa")
piqa = partial(_load, "piqa")
