# SPDX-License-Identifier: Apache-2.0
r"""Turn a finished run of `train.py` into a shipped checkpoint: bfloat16 weights, scores of these, model card.

    python examples/research/export.py --run runs/stlm-3m --output examples/checkpoints/stlm-3m --data examples/checkpoints/sources.md \
        --validation validation.jsonl.gz --test test.jsonl.gz

`--data` is a Markdown file that names the training texts and their licences; it is copied into the card. The
rounded weights are evaluated again, so the card has the scores of the files, not of the run. The folder gets no code
(`push_to_hub.py` adds it), and a `config.json` with dtype float32, in which the weights are loaded. With `--after`,
the weights are those of a run that started from `--run`, or the mean of several (arXiv:2203.05482), and `results.json` keeps what
is known of all. `--share 0.5` takes the mean of the weights before and after (WiSE-FT, arXiv:2109.01903), with the `rope_theta` and the
`trunk_window_patches` of the last run after. `--plus BEFORE AFTER` adds what another training changed, from the weights of one exported
checkpoint to those of another (task arithmetic, arXiv:2212.04089). `--set` changes fields of the config that size no weight.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from provenance import run_info
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import share
from pretrain import field_value, load_config
from score import bits_of_documents, documents

from modeling_stlm import STLMTokenizer
from modeling_stlm.training.model_card import build_model_card, write_model_card


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="output folder of train.py")
    parser.add_argument(
        "--after",
        type=Path,
        nargs="+",
        default=[],
        help="output folders of runs that went on from the weights of --run",
    )
    parser.add_argument("--share", type=share, default=1.0, help="of the weights after, in a mean with those before")
    parser.add_argument(
        "--plus",
        type=Path,
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="exported checkpoints: the weights in AFTER minus those in BEFORE are added",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="config fields to change, as JSON")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Markdown about the training texts")
    parser.add_argument("--licence", default="cc-by-sa-4.0", help="licence of the weights, as the Hub spells it")
    parser.add_argument("--language", default="en", help="of the texts, as the Hub spells it")
    parser.add_argument("--validation", nargs="+", required=True, help="files or patterns")
    parser.add_argument("--test", nargs="+", required=True, help="files or patterns")
    args = parser.parse_args()
    if not args.after and args.share != 1:
        parser.error("--share needs --after")
    read = (args.run, *args.after, *(args.plus or ()))
    if len(read) > 1 and args.output.resolve() in (folder.resolve() for folder in read):
        parser.error("--output must be none of --run, --after and --plus: a second call would average or add twice")
    return args


def interpolated(args: argparse.Namespace) -> PreTrainedModel:
    """The model to publish, in bfloat16."""
    shares = Counter({args.run: 1 - args.share if args.after else 1.0})
    for folder in args.after:
        shares[folder] += args.share / len(args.after)
    if args.plus:
        before, after = args.plus
        shares[before] -= 1
        shares[after] += 1
    published = args.after[-1] if args.after else args.run
    models = {
        folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder, share in shares.items()
        if share or folder == published
    }
    wanted = models[published].config.to_diff_dict()
    for folder, model in models.items():
        config = model.config.to_diff_dict()
        names = (wanted.keys() | config.keys()) - {"auto_map", "use_cache"}
        if folder not in args.after:  # no weights
            names -= {"rope_theta", "trunk_window_patches"}
        if other := sorted(name for name in names if wanted.get(name) != config.get(name)):
            raise SystemExit(f"{folder} and {published} differ in {other}: such weights cannot be added")
    weights = {folder: model.state_dict() for folder, model in models.items()}
    total = {name: sum(shares[folder] * weights[folder][name] for folder in models) for name in weights[published]}
    config = load_config(str(published), args.set, is_checkpoint=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(published, config=config, dtype=torch.float32)
        model.load_state_dict(total)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"--set {' '.join(args.set)} does not fit the weights: {error}") from None
    return model.to(torch.bfloat16)


def results_of(folder: Path) -> dict:
    path = folder / "results.json"
    if not path.is_file():
        raise SystemExit(f"{folder} has no results.json: expected a folder that train.py or export.py has written")
    return json.loads(path.read_text())


def added_phases(before: Path, after: Path) -> list[dict]:
    """What `results.json` keeps of the runs from one exported checkpoint to another that started from it."""
    first, then = results_of(before), results_of(after)
    known, later = first.get("afterwards", []), then.get("afterwards", [])
    same_start = all(first.get(name) == then.get(name) for name in ("commit", "steps", "arguments"))
    if not same_start or later[: len(known)] != known or len(later) == len(known):
        raise SystemExit(
            f"expected checkpoints that export.py has written, the second with --after the first: the `afterwards` of "
            f"{after} do not go on from those of {before}"
        )
    return [phase | {"added": True} for phase in later[len(known) :]]


def kept_changes(changes: list[str], config) -> list[str]:
    """Those of `--set`, of earlier exports too, that `config` has: a run after has a config of its own."""
    last = {change.partition("=")[0]: change for change in changes}
    return [change for name, change in last.items() if getattr(config, name) == field_value(change.partition("=")[2])]


def main():
    args = parse_arguments()
    results = results_of(args.run)
    phases = results.setdefault("afterwards", [])
    block_bytes = int(results["arguments"]["block_bytes"])
    for folder in args.after:
        after = results_of(folder)
        if "base_model" not in after:
            raise SystemExit(f"{folder} started from random weights, not from those of {args.run}")
        kept = ("steps", "bytes_seen", "arguments", "commit", "device", "torch", "transformers")
        phases.append({name: after[name] for name in kept} | {"share_of_weights": args.share / len(args.after)})
        results["bits_per_byte"] = after["bits_per_byte"]
    if args.plus:
        added = added_phases(*args.plus)
        if any({**phase, "added": True} in added for phase in phases):
            raise SystemExit(f"what {args.plus[1]} changed is in the weights of {args.run} already")
        phases += added
    if not phases:
        del results["afterwards"]
    if args.share < 1 or len(args.after) > 1 or args.plus:  # nothing but the scores of the exported weights
        results.pop("bits_per_byte", None)
    tokenizer = STLMTokenizer()
    model = interpolated(args)
    model.config.use_cache = True
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    for code in args.output.glob("*.py"):
        code.unlink()
    path = args.output / "config.json"
    config = json.loads(path.read_text()) | {"dtype": "float32"}
    config.pop("auto_map", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    model = AutoModelForCausalLM.from_pretrained(args.output)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    scores = {
        split: bits_of_documents(model, tokenizer, documents(getattr(args, split)), block_bytes)
        for split in ("validation", "test")
    }
    if fields_set := kept_changes([*results.pop("fields_set", []), *args.set], model.config):
        results["fields_set"] = fields_set
    results["stored_parameters"] = model.num_parameters()
    results["config"] = {name: value for name, value in model.config.to_diff_dict().items() if name != "auto_map"}
    if args.run.resolve() != args.output.resolve():
        shutil.copy(args.run / "loss.png", args.output / "loss.png")
    exported = {"dtype": "bfloat16", "scores": scores} | run_info()
    (args.output / "results.json").write_text(json.dumps(results | {"exported": exported}, indent=1) + "\n")
    card = build_model_card(
        args.output, licence=args.licence, language=args.language, data=args.data.read_text(encoding="utf-8")
    )
    print(card.content if write_model_card(args.output, card) else f"kept {args.output / 'README.md'} as it is")


if __name__ == "__main__":
    main()
