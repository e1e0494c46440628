# SPDX-License-Identifier: Apache-2.0
r"""An encoder from a causal checkpoint: masked bytes, and sentence embeddings learned from a larger model, in one pass.

    python examples/encoder.py --text 'wiki*.jsonl.gz' --teacher all-MiniLM-L6-v2 --passages 160000 --max_minutes 60 \
        --output runs/encoder

Takes passages of whole sentences from `--text` (files as of `pretrain.py`), asks the teacher for their embeddings once, and
trains with the plain `Trainer`: a quarter of the rows has masked spans, a quarter is noisy (typos, case, look-alikes) and
keeps the embedding of the clean text. Ctrl-C and SIGTERM save; the same command goes on. The output loads through
`AutoModelForMaskedLM`, every classification head, and `SentenceTransformer`.
"""

import argparse
import json
import random
from pathlib import Path

from inputs import (
    HelpFormatter,
    add_bf16,
    add_rates,
    as_text,
    at_least_one,
    checkpoint,
    choose_precision,
    file_pattern,
    output_of,
    positive,
    quiet_exit,
    rates_of,
    require,
    sentence_encoder,
    whole,
)


HERE = Path(__file__).parent
NUM_HELD_OUT = 500  # passages
MAY_CHANGE = ("output", "max_minutes")  # where a run goes on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--text", type=file_pattern, nargs="+", required=True, help="files or patterns")
    parser.add_argument(
        "--teacher", type=sentence_encoder, required=True, help="a sentence-transformers folder or Hub id"
    )
    parser.add_argument(
        "--output", type=output_of("STLMForMaskedLM", own=("begun.json",)), required=True, help="folder of the encoder"
    )
    parser.add_argument(
        "--checkpoint", type=checkpoint, default=str(HERE / "checkpoints" / "stlm-3m"), help="folder or Hub id"
    )
    parser.add_argument("--passages", type=at_least_one, default=100_000, help="at most")
    parser.add_argument("--max_bytes", type=at_least_one, default=320, help="longest passage")
    parser.add_argument("--max_minutes", type=positive, default=45, help="of training")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="for --max_minutes")
    parser.add_argument("--batch_size", type=at_least_one, default=64, help="passages per step")
    add_rates(parser)
    add_bf16(parser, "bfloat16 autocast, of the teacher, too")
    parser.add_argument("--seed", type=whole, default=1, help="of weights and order")
    return parser.parse_args()


if __name__ == "__main__":
    args = parse_arguments()
    require("train", "accelerate", "datasets", "matplotlib", "sentence_transformers")

import numpy as np
import torch
from noise import KINDS, add_noise
from run_folder import (
    EndOnDivergence,
    ResumeLine,
    begin,
    is_spent,
    last_checkpoint,
    names_and_sizes,
    per_device,
    write_results,
)
from score import documents
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, TrainingArguments, set_seed

import modeling_stlm  # noqa: F401  (registers the Auto classes)
from modeling_stlm.training.long_runs import SaveByTime, StopOnSignal
from modeling_stlm.training.optimizer import MuonRecipe
from modeling_stlm.training.sentence_embeddings import (
    EmbeddedPassages,
    EmbeddingTrainer,
    compress,
    look_both_ways,
    passages_of,
    save_sentence_transformer,
)
from modeling_stlm.training.time_budget import TimeBudget


def embedded_passages(args: argparse.Namespace):
    """Passages, and what the teacher makes of them (N, E): made once, and kept in the output folder."""
    folder = args.output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    texts, vectors = folder / "passages.json", folder / "teacher.npy"
    if not vectors.is_file():
        generator = random.Random(args.seed)
        passages = [p for text in documents(args.text) for p in passages_of(as_text(text), args.max_bytes, generator)]
        generator.shuffle(passages)
        passages = passages[: args.passages]
        if len(passages) < 2 * NUM_HELD_OUT:
            raise SystemExit(f"found {len(passages)} passages, expected at least {2 * NUM_HELD_OUT}: take more text")
        texts.write_text(json.dumps(passages))
        teacher = SentenceTransformer(args.teacher)
        if args.bf16:
            teacher = teacher.to(torch.bfloat16)
        print(f"{args.teacher}: embeddings of {len(passages):,} passages", flush=True)
        embeddings = teacher.encode(passages, batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        written = vectors.with_suffix(".part")
        with written.open("wb") as file:
            np.save(file, embeddings.cpu().to(torch.float16).numpy())
        written.replace(vectors)  # whole, wherever the program is stopped
    embeddings = np.load(vectors, mmap_mode="r")
    return json.loads(texts.read_text())[: len(embeddings)], embeddings


def noisy(text: str, generator: random.Random) -> str:
    """In one case throughout, or with typos, other case and look-alikes in up to 15% of the letters."""
    if generator.random() < 0.3:
        return generator.choice((text.lower(), text.upper()))
    rate, seed = generator.uniform(0.02, 0.15), generator.random()
    return add_noise(text, generator.choice(sorted(KINDS)), rate, seed)


def main(args: argparse.Namespace):
    choose_precision(args)
    checkpoint_folder = last_checkpoint(args.output)
    settings = {name: str(value) for name, value in vars(args).items() if name not in MAY_CHANGE}
    settings["text"] = names_and_sizes(args.text)
    goes_on = checkpoint_folder is not None or (args.output / "data" / "teacher.npy").is_file()
    begin(args.output / "begun.json", settings, goes_on)
    set_seed(args.seed)
    # The library's pipelines cannot pad an empty text on the left.
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, padding_side="right")
    # Eager attention: in bfloat16 on a CPU, a step with rows this short takes 0.84 of the time (research/LOG.md).
    options = {"is_causal": False, "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForMaskedLM.from_pretrained(args.checkpoint, **options)
    if AutoConfig.from_pretrained(args.checkpoint).is_causal:
        look_both_ways(model)
    print(f"{args.checkpoint}: {model.num_parameters():,} parameters, {model.device}, {model.dtype}")
    passages, embeddings = embedded_passages(args)
    embeddings = compress(embeddings, model.config.hidden_size)
    data = EmbeddedPassages(passages[NUM_HELD_OUT:], embeddings[NUM_HELD_OUT:], tokenizer, noisy)
    stop, budget = StopOnSignal(), TimeBudget(args.max_minutes, clock=args.clock)
    resume = ResumeLine(lambda state: f"{budget.elapsed_seconds / 60:.1f} of {args.max_minutes:g} min")
    trainer = EmbeddingTrainer(
        model,
        TrainingArguments(
            str(args.output),
            max_steps=10**9,  # `TimeBudget` stops
            lr_scheduler_type="constant",
            per_device_train_batch_size=per_device(args.batch_size),
            train_sampling_strategy="group_by_length",
            logging_steps=25,
            save_strategy="no",  # by time
            save_total_limit=1,
            bf16=args.bf16,
            seed=args.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data,
        data_collator=data.collate,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonRecipe, rates_of(args)),
        callbacks=[budget, resume, SaveByTime(minutes=5), stop],
    )
    trainer.add_callback(EndOnDivergence("--muon_lr or --adamw_lr, with a new --output"))
    if not is_spent(trainer, checkpoint_folder, args.max_minutes):
        trainer.train(resume_from_checkpoint=checkpoint_folder)
    if stop.received is not None:
        print(f"{stop.received.name}: saved at step {trainer.state.global_step}; the same command goes on from here")
        raise SystemExit(128 + stop.received)
    save_sentence_transformer(model, tokenizer, args.output)

    encoder = SentenceTransformer(str(args.output), device="cpu")
    found = encoder.encode(passages[:NUM_HELD_OUT], normalize_embeddings=True)
    cosine = float((found * embeddings[:NUM_HELD_OUT]).sum(1).mean())
    write_results(
        args.output,
        args.checkpoint,
        scores={"held out": {"cosine_to_teacher": cosine}},
        tasks={"held out": "sentence-similarity"},
        arguments={
            "text": " ".join(Path(file).name for file in args.text),
            "teacher": Path(args.teacher).name,
            "max_minutes": f"{args.max_minutes:g}" + (" of CPU time" if args.clock == "cpu" else ""),
            **{
                name: getattr(args, name)
                for name in ("max_bytes", "batch_size", "muon_lr", "adamw_lr", "matrix_optimizer", "bf16", "seed")
            },
        },
        steps=trainer.state.global_step,
        passages=len(passages),
    )
    print(f"\ncosine to the teacher's embeddings on {NUM_HELD_OUT} passages that were held out: {cosine:.3f}")
    print(f"next: python examples/embed.py --checkpoint {args.output} --train rows.csv --test other_rows.csv")


if __name__ == "__main__":
    with quiet_exit():
        main(args)
