# SPDX-License-Identifier: Apache-2.0
"""How many bytes a pass of the model confirms if something cheap drafts them (lossless speculative decoding).

    python examples/drafts.py examples/checkpoints/stlm-10m --train 'train/*.jsonl.gz' --validation validation.jsonl.gz

Bytes a pass for texts of several kinds: the one that the model gives anyway, and the drafted ones before the first mistake.
Kinds are held-out text by source (what sampling writes, if the model is right), each with 128 bytes of context before; what
the model writes itself; and the second half of a text that repeats the first with every tenth word in capitals (what a
model writes that edits). Drafters:

- `repeats`: those of `generate(prompt_lookup_num_tokens=48)`. The second table has CPU milliseconds of a written byte, reading
  the prompt included, plain and with these drafts, in turns: of greedy and edited text all rows, of other kinds two. Greedy
  text is written freely, and texts that differ are counted; other text `generate` is made to write.
- `layer`: a small recurrent draft layer, greedily (in the manner of Hydra, arXiv:2402.05109), trained here on the frozen
  model: from the hidden state of a byte and the byte after it to the next one, and so on. `layer, inside a patch`: it stops
  before a byte that would end a patch, so that no pass runs the trunk for a patch that is taken back.
- `model, inside a patch`: the likeliest byte of the model itself at each place, about what a drafter of one proposal can
  come to that stops at the ends of patches.

At the end CPU milliseconds of a plain step and of a pass over several bytes, half of those of the pass before taken back,
where no patch ends.
"""

import argparse
import copy
import json
import time
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import load_dataset
from provenance import run_info
from scoring import documents
from tables import markdown_table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor

from modeling_stlm.generation_stlm import RepeatCandidateGenerator
from modeling_stlm.training.corpus import PackedWindows, write_corpus


WINDOW, WRITTEN, PROMPT = 1024, 512, 128
REPEATS = {"prompt_lookup_num_tokens": 48}
EDITED, GREEDY = "twice, edited", "written greedily"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument(
        "--validation", required=True, help="JSON lines with text and source; all but small sources are measured"
    )
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time, for the draft layer")
    parser.add_argument("--size", type=int, default=256, help="intermediate size of the draft layer")
    parser.add_argument("--drafted", type=int, default=4, help="bytes the draft layer drafts at once, up to 7")
    parser.add_argument("--rows", type=int, default=8, help="windows of each source")
    args = parser.parse_args()
    if not 1 <= args.drafted <= 7:
        parser.error(f"--drafted takes 1 to 7 bytes, got {args.drafted}: passes of more are not timed inside a patch")
    return args


class DraftLayer(nn.Module):
    """`hidden (..., D)` of a byte and the embedding of the byte after it to the hidden state that predicts the next."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.hidden_norm, self.byte_norm, self.norm = (nn.LayerNorm(width, bias=False) for _ in range(3))
        self.up_proj, self.down_proj = nn.Linear(2 * width, size, bias=False), nn.Linear(size, width, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, hidden: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.hidden_norm(hidden), self.byte_norm(embedding)], dim=-1)
        return hidden + self.down_proj(self.up_proj(both).relu().square())


def train(layer: DraftLayer, model, windows: PackedWindows, drafted: int, minutes: float) -> int:
    """Steps taken."""
    step, started, table = 0, time.process_time(), model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    loader = DataLoader(windows, batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    while True:
        for batch in loader:
            share = (time.process_time() - started) / 60 / minutes
            if share >= 1:
                return step
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 2 - 2 * share)
            ids = batch["input_ids"]
            with torch.no_grad():
                hidden = model.model(ids, position_ids=batch["position_ids"], use_cache=False).last_hidden_state
            loss, num_bytes = 0, ids.shape[1] - drafted - 1
            hidden = hidden[:, :num_bytes]
            for i in range(1, drafted + 1):
                hidden = layer(hidden, table[ids[:, i : i + num_bytes]])
                logits = F.linear(layer.norm(hidden), table)
                loss = loss + F.cross_entropy(logits.flatten(0, 1), ids[:, i + 1 : i + 1 + num_bytes].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1


def bytes_a_pass(agreed: torch.Tensor) -> float:
    """Mean over the passes of a walk through rows where the first `agreed (B, T)` drafts behind byte t are right."""
    passes = walked = 0
    for row in agreed.tolist():
        at = 0
        while at < len(row):
            at, passes = at + 1 + row[at], passes + 1
        walked += at
    return walked / passes


@torch.no_grad()
def measure(layer: DraftLayer, model, ids: torch.Tensor, drafted: int, first: int) -> dict[str, float]:
    """Bytes a pass for each drafter, on the texts `ids (B, T)`, of which the `first` bytes are context only."""
    outputs = model(ids, use_cache=False, output_boundaries=True, output_hidden_states=True)
    num_bytes = ids.shape[1] - first - drafted - 1

    def ahead(states: torch.Tensor) -> torch.Tensor:  # (B, T, drafted): of the bytes two and more after each
        return states[:, first + 2 : first + 1 + num_bytes + drafted].unfold(1, drafted, 1)

    def agreed(drafts: torch.Tensor, inside: bool) -> torch.Tensor:
        right = drafts == ahead(ids)
        return (right & ~ahead(outputs.boundaries) if inside else right).int().cumprod(-1).sum(-1)

    hidden, byte = outputs.hidden_states[-1][:, first : first + num_bytes], ids[:, first + 1 : first + 1 + num_bytes]
    table, drafts = model.get_input_embeddings().weight, []
    for _ in range(drafted):
        hidden = layer(hidden, table[byte])
        byte = F.linear(layer.norm(hidden), table).argmax(-1)
        drafts.append(byte)
    drafts = torch.stack(drafts, -1)
    likeliest = ahead(F.pad(outputs.logits.argmax(-1), (1, -1)))
    return {
        "repeats": bytes_a_pass(torch.tensor([repeats_agreed(text, first + 2, num_bytes) for text in ids.tolist()])),
        "layer": bytes_a_pass(agreed(drafts, False)),
        "layer, inside a patch": bytes_a_pass(agreed(drafts, True)),
        "model, inside a patch": bytes_a_pass(agreed(likeliest, True)),
    }


def repeats_agreed(text: list[int], first: int, num_bytes: int) -> list[int]:
    """How many drafts of `generate` are right behind the `first` bytes, the `first` and one more, and so on."""
    drafter = RepeatCandidateGenerator(REPEATS["prompt_lookup_num_tokens"], len(text) + 1, max(text) + 1)
    drafter.get_candidates(torch.tensor([text[: first - 1]]))
    agreed = []
    for end in range(first, first + num_bytes):
        draft = drafter.get_candidates(torch.tensor([text[:end]]))[0][0, end:].tolist()
        right = (a == b for a, b in zip(draft, text[end:]))
        agreed.append(len(list(takewhile(bool, right))))
    return agreed


def edited(text: torch.Tensor) -> torch.Tensor:
    """`text (T,)` and behind it the same text with every tenth word in capital letters: (2 T,)."""
    in_tenth_word = (text == ord(" ")).cumsum(0) % 10 == 9
    small = (text >= ord("a")) & (text <= ord("z"))
    return torch.cat([text, text - 32 * (in_tenth_word & small)])


def texts_by_kind(model, tokenizer, validation: str, num_rows: int) -> dict[str, torch.Tensor]:
    """Ids (B, T) of each kind of text."""
    by_source = {}
    for row in load_dataset("json", data_files=validation, split="train"):
        by_source.setdefault(row["source"].split("/")[0], []).append(row["text"])
    kinds = {}
    for source, rows in by_source.items():
        ids = torch.tensor(tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"])
        if len(ids) >= num_rows * WINDOW:
            kinds[source] = ids[: num_rows * WINDOW].view(num_rows, WINDOW)
    if not kinds:
        raise SystemExit(f"no source of {validation} has {num_rows * WINDOW:,} bytes: give fewer --rows")
    prompts = torch.cat([rows[:2, :PROMPT] for rows in kinds.values()])
    kinds[EDITED] = torch.stack([edited(rows[0, : WINDOW // 2]) for rows in kinds.values()])
    # A checkpoint may bring other defaults.
    options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": WRITTEN, "eos_token_id": None}
    sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(0)
    return kinds | {
        GREEDY: model.generate(prompts, do_sample=False, **options),
        "sampled": model.generate(prompts, temperature=1.0, **sampling, **options),
        "sampled, temperature 0.7": model.generate(prompts, temperature=0.7, **sampling, **options),
    }


@torch.no_grad()
def pass_milliseconds(model, tokenizer, num_bytes: int, repeats: int = 200) -> float:
    """CPU time of a pass over `num_bytes` bytes after another one, half of whose bytes are taken back first."""
    prompt, word = (tokenizer([text], return_tensors="pt")["input_ids"] for text in ("All of the words ", "abcdefgh"))
    before, spent = DynamicCache(config=model.config), 0.0
    if num_bytes > 1:
        before.activate_past_recording()
    model(prompt, past_key_values=before, use_cache=True)
    ended = model(word[:, :num_bytes], past_key_values=before, use_cache=True, output_boundaries=True).boundaries
    before.crop(-(num_bytes // 2))
    for repeat in range(repeats):
        cache = copy.deepcopy(before)
        started = time.process_time()
        outputs = model(word[:, :num_bytes], past_key_values=cache, use_cache=True, output_boundaries=not repeat)
        spent += time.process_time() - started
        ended = ended if repeat else ended | outputs.boundaries
    if ended.any():
        raise SystemExit("a patch of this model ends in the middle of a word: the time of a pass without is unknown")
    return 1000 * spent / repeats


class Follow(LogitsProcessor):
    """Has `text` (T,) written whatever the logits are. Other logits stay finite: forbidden bytes would not be drafted."""

    def __init__(self, text: torch.Tensor):
        self.text = text

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(1, self.text[input_ids.shape[1]], 1e6)


def writing_milliseconds(
    model, tokenizer, texts: torch.Tensor, first: int, freely: bool
) -> tuple[dict[str, float], int]:
    """CPU time of a byte that `generate` writes behind the `first` bytes of `texts (B, T)`; how many texts differ."""
    ways, spent, different = {"plain": {}, "repeats": REPEATS}, {"plain": 0.0, "repeats": 0.0}, 0
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "use_cache": True}
    for row, text in enumerate(texts):
        prompt = {"input_ids": text[None, :first], "attention_mask": torch.ones(1, first, dtype=torch.long)}
        options |= {"max_length": len(text), "logits_processor": [] if freely else [Follow(text)]}
        written = []
        for name in sorted(ways, reverse=row % 2 == 1):
            started = time.process_time()
            written.append(model.generate(**prompt, **options, **ways[name]))
            spent[name] += time.process_time() - started
        different += not torch.equal(*written)
    return {name: 1000 * seconds / texts[:, first:].numel() for name, seconds in spent.items()}, different


def main():
    args = parse_arguments()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval().requires_grad_(False)
    layer = DraftLayer(model.config.hidden_size, args.size)
    with TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "train.bin", documents(args.train), tokenizer)
        steps = train(layer, model, PackedWindows(corpus, tokenizer, WINDOW), args.drafted, args.minutes)
    info = run_info()
    print(f"{args.checkpoint}, {info['device']}, commit {info['commit']}; draft layer of {args.size}, {steps} steps")
    kinds = texts_by_kind(model, tokenizer, args.validation, args.rows)
    results, milliseconds, differ = {}, {}, {}
    for kind, ids in kinds.items():
        first = ids.shape[1] // 2 if kind == EDITED else PROMPT
        results[kind] = measure(layer, model, ids, args.drafted, first)
        texts = ids if kind in (EDITED, GREEDY) else ids[:2]
        milliseconds[kind], differ[kind] = writing_milliseconds(model, tokenizer, texts, first, kind == GREEDY)
        milliseconds[kind]["speed"] = milliseconds[kind]["plain"] / milliseconds[kind]["repeats"]
    for title, table in ((f"bytes a pass, {args.drafted} by the layer", results), ("CPU ms a byte", milliseconds)):
        columns = list(next(iter(table.values())))
        rows = ([kind, *(f"{row[name]:.2f}" for name in columns)] for kind, row in table.items())
        print(markdown_table([title, *columns], rows), end="\n\n")
    print(f"{differ[GREEDY]} of {len(kinds[GREEDY])} greedy texts differ")
    passes = {n: pass_milliseconds(model, tokenizer, n) for n in (1, 2, args.drafted + 1)}
    print("CPU ms of a pass:", ", ".join(f"{n} bytes {ms:.2f}" for n, ms in passes.items()))
    found = {"results": results, "milliseconds": milliseconds, "differ": differ, "pass": passes}
    print(json.dumps(found | {"arguments": vars(args)} | info))


if __name__ == "__main__":
    main()
