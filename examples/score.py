# SPDX-License-Identifier: Apache-2.0
r"""Bits per byte of documents, or the log-probability of lines, under any causal language model.

    python examples/score.py examples/checkpoints/stlm-3m validation.jsonl.gz
    printf 'The cat sat.\nThe cat sit.\n' | python examples/score.py examples/checkpoints/stlm-10m-wide

Documents are cut into windows of 1024 bytes, as `pretrain.py` measures them, and go through `Trainer.evaluate`; the last line
printed is JSON. Without files, the lines of the standard input are scored one by one. A text starts with `<bos>`, which the
tokenizer does not add by itself: without it a model takes the text for the middle of a longer one.
"""

import argparse
import codecs
import json
import sys
import tempfile
from collections.abc import Iterable
from glob import escape
from pathlib import Path

from inputs import (
    HelpFormatter,
    causal_checkpoint,
    file_pattern,
    files_of,
    kind_of,
    quiet_exit,
    read_bytes,
    read_utf8,
    require,
    unpacking,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=causal_checkpoint, help="folder or Hub id")
    parser.add_argument("files", type=file_pattern, nargs="*", help="as of pretrain.py; without any, lines are read")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets")

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_stlm import STLMTokenizer
from modeling_stlm.training.bits_per_byte import BitsPerByteEvaluator, bits_per_byte
from modeling_stlm.training.corpus import PackedWindows, write_corpus


def first_bad_byte(data: bytes, piece: int = 2**24) -> int | None:
    """Where `data` stops being UTF-8, if it does; decoded in pieces, for text takes up to four times the memory of its bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), piece):
        (kept, _) = decoder.getstate()  # the beginning of a character
        try:
            decoder.decode(data[start : start + piece], final=start + piece >= len(data))
        except UnicodeDecodeError as error:
            return start - len(kept) + error.start
    return None


def documents(patterns: list[str]) -> Iterable[str | bytes]:
    """Texts of all files that match."""
    files = files_of(patterns)
    if not files:
        raise SystemExit(f"no file matches {patterns}")
    for file in files:
        kind = kind_of(Path(file))
        if kind is None:
            data = read_bytes(Path(file))
            if (bad := first_bad_byte(data)) is not None:
                offset = f"byte 0x{data[bad]:02x} at offset {bad}"
                print(f"{file} is not UTF-8 ({offset}): taken byte by byte as it is", file=sys.stderr)
            yield data
        else:
            try:
                with unpacking(Path(file)):
                    rows = load_dataset(kind, data_files=escape(file), split="train")
            except DatasetGenerationError as error:
                if kind != "parquet":
                    read_utf8(Path(file))  # names the byte
                reason = " ".join(str(error.__cause__ or error).split())
                raise SystemExit(f"{file} cannot be read as {kind}: {reason}") from None
            if "text" not in rows.column_names:
                raise SystemExit(f"{file} has the columns {rows.column_names}, expected one of the name text")
            for number, text in enumerate(rows["text"], 1):
                if not isinstance(text, str):
                    raise SystemExit(f"row {number} of {file} has the text {json.dumps(text)[:80]}, expected a string")
                yield text


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Bytes of each id of a byte-level tokenizer, 0 for special tokens.

    Raises:
        ValueError: if the tokenizer is not byte-level: the bytes of other tokens are unknown.
    """
    # A byte-level vocabulary writes each byte as one character.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    alphabet = None if isinstance(tokenizer, STLMTokenizer) else set(bytes_to_unicode().values())
    if alphabet:
        foreign = [p for i, p in enumerate(pieces) if i not in special and not alphabet.issuperset(p)]
        if foreign:
            raise ValueError(
                f"bits per byte need a byte-level tokenizer, but this one has tokens such as {foreign[:3]}"
            )
    return torch.tensor([0 if i in special else len(piece) for i, piece in enumerate(pieces)])


def bytes_per_token(ids: torch.Tensor | np.ndarray, sizes: torch.Tensor) -> float:
    """Mean of `sizes (V,)` over the `ids (N,)` of a text, which may be a file that is mapped."""
    counts, chunk = np.zeros(len(sizes), dtype=np.int64), 1 << 24
    for start in range(0, len(ids), chunk):
        counts += np.bincount(ids[start : start + chunk], minlength=len(sizes))
    return float(counts @ sizes.double().numpy()) / len(ids)


def bits_of_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | bytes],
    block_bytes: int = 1024,
) -> dict[str, float]:
    """`{"bits_per_byte": ..., "bytes": ...}` over windows of about `block_bytes` bytes without overlap.

    The rest after the last window is dropped.

    Raises:
        ValueError: if the texts are shorter than a window.
    """
    sizes = token_bytes(tokenizer)
    evaluator = BitsPerByteEvaluator(sizes)
    with tempfile.TemporaryDirectory() as folder:
        path = write_corpus(Path(folder) / "text.bin", documents, tokenizer)
        packed = PackedWindows(path, tokenizer, 1)
        ids = torch.from_numpy(packed.ids.astype("int64"))
        block_size = round(block_bytes / bytes_per_token(ids, sizes))
        if len(packed) < block_size:
            num_bytes = int(sizes[ids].sum())
            raise ValueError(f"{num_bytes:,} bytes of text, expected at least a window of {block_bytes:,}")
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                batch_eval_metrics=True,
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            eval_dataset=PackedWindows(path, tokenizer, block_size),
            compute_metrics=evaluator,
            preprocess_logits_for_metrics=evaluator.nats,
        )
        metrics = trainer.evaluate()
    return {"bits_per_byte": metrics["eval_bits_per_byte"], "bytes": metrics["eval_bytes"]}


@torch.no_grad()
def nats_of_text(model: PreTrainedModel, ids: torch.Tensor, bos_token_id: int) -> float:
    """Negative log-probability of `ids (T,)` after `<bos>`."""
    inputs = F.pad(ids, (1, 0), value=bos_token_id)[None].to(model.device)
    return float(F.cross_entropy(model(inputs).logits[0, :-1].float(), inputs[0, 1:], reduction="sum"))


def score_lines(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lines: Iterable[str]) -> None:
    """Print the log-probability and the bits per byte of each line that is not empty."""
    sizes = token_bytes(tokenizer)
    print("log-probability (nats)  bits per byte  text")
    for line in filter(None, (line.rstrip("\r\n") for line in lines)):
        # `<eos>` in a line is five bytes, as in the texts of a training.
        ids = tokenizer(line, add_special_tokens=False, split_special_tokens=True, return_tensors="pt")["input_ids"][0]
        nats = nats_of_text(model, ids, tokenizer.bos_token_id)
        print(f"{-nats:22.2f}  {bits_per_byte(nats, int(sizes[ids].sum())):13.3f}  {line}", flush=True)


def main(args: argparse.Namespace):
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    if not args.files:
        sys.stdin.reconfigure(encoding="utf-8")
        try:
            return score_lines(model, tokenizer, sys.stdin)
        except UnicodeDecodeError as error:
            raise SystemExit(f"standard input is not UTF-8 ({error.reason}): convert it first") from None
    try:
        scores = bits_of_documents(model, tokenizer, documents(args.files))
    except ValueError as error:
        raise SystemExit(f"{' '.join(args.files)}: {error}") from None
    print(json.dumps(scores))


if __name__ == "__main__":
    with quiet_exit():
        main(args)
