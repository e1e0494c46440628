# SPDX-License-Identifier: Apache-2.0
"""Publish a checkpoint folder in one commit: weights, code, tokenizer, generation config, curve, results, model card.

    python examples/push_to_hub.py --checkpoint runs/finetuned --repo_id YOUR_NAME/stlm-shakespeare --dry_run
    hf auth login
    python examples/push_to_hub.py --checkpoint runs/finetuned --repo_id YOUR_NAME/stlm-shakespeare

The code of the installed package goes along, so `AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)`
works for people who have not installed it. The card is the `README.md` of the folder; without one, the card of the
repository stays, and if there is none either, one is generated from `config.json` and `results.json`. What was fine-tuned
inherits licence, language and texts of its base model.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from inputs import HelpFormatter, checkpoint, quiet_exit, read_text, text_file


def checkpoint_folder(value: str) -> Path:
    if not (Path(checkpoint(value)) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{value} is no folder with a checkpoint")
    return Path(value)


def base_model(value: str) -> str:
    return value if value == "none" else checkpoint(value)


def hub_name(value: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise argparse.ArgumentTypeError(f"{value!r}: expected YOUR_NAME/MODEL")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--checkpoint", type=checkpoint_folder, required=True, help="folder")
    parser.add_argument("--repo_id", type=hub_name, required=True, help="YOUR_NAME/MODEL")
    parser.add_argument("--private", action="store_true", help="only you see a new repository")
    parser.add_argument("--dry_run", action="store_true", help="write the folder and show the card; publish nothing")
    card = parser.add_argument_group("for a generated card")
    card.add_argument(
        "--base_model",
        type=base_model,
        help="folder or Hub id of what was fine-tuned, or none; default: see results.json",
    )
    card.add_argument("--licence", help="of the weights, as the Hub spells it; default: that of the base model")
    card.add_argument("--language", help="of the texts, as the Hub spells it; default: that of the base model")
    card.add_argument(
        "--data",
        type=text_file,
        help="Markdown about the texts you trained on and their licences; without it the card says that they are not described",
    )
    args = parser.parse_args()
    has_card, has_results = ((args.checkpoint / name).is_file() for name in ("README.md", "results.json"))
    if has_card and (args.base_model or args.licence or args.language or args.data):
        parser.error(f"{args.checkpoint} has a card: change its README.md")
    if not has_card and not has_results and args.base_model is None:
        parser.error(
            f"{args.checkpoint} does not say what it was made from: give --base_model, whose licence holds for it, or "
            "--base_model none for weights trained from random ones"
        )
    return args


if __name__ == "__main__":
    args = parse_arguments()

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from transformers import AutoConfig, AutoTokenizer

import modeling_stlm
from modeling_stlm.training.model_card import build_model_card, write_model_card


def write_folder(args: argparse.Namespace, class_name: str, folder: str | Path) -> None:
    # The class that was saved: loaded as another, it would lose its head.
    getattr(modeling_stlm, class_name).from_pretrained(args.checkpoint).save_pretrained(folder)
    AutoTokenizer.from_pretrained(args.checkpoint).save_pretrained(folder)
    # The weights as they are: loading may have changed their dtype.
    for name in ("model.safetensors", "README.md", "loss.png", "results.json"):
        if (args.checkpoint / name).is_file():
            shutil.copy(args.checkpoint / name, folder)


def generated_card(args: argparse.Namespace):
    base = None if args.base_model == "none" else args.base_model
    options = {"base_model": base, "licence": args.licence, "language": args.language}
    if args.data is not None:
        options["data"] = read_text(args.data)
    else:
        print("--data about.md would name the texts you trained on and their licences in the card")
    try:
        return build_model_card(args.checkpoint, repo_id=args.repo_id, **options)
    except ValueError as error:
        raise SystemExit(f"no card for {args.checkpoint}: {error}") from None


def show(args: argparse.Namespace, class_name: str) -> None:
    card = None if (args.checkpoint / "README.md").is_file() else generated_card(args)
    folder = Path(tempfile.mkdtemp(prefix=f"{args.repo_id.split('/')[1]}-"))
    write_folder(args, class_name, folder)
    if card is not None:
        write_model_card(folder, card)
    print((folder / "README.md").read_text(encoding="utf-8"))
    print(f"not published: {folder} holds {', '.join(sorted(path.name for path in folder.iterdir()))}")


def publish(args: argparse.Namespace, class_name: str) -> None:
    if get_token() is None:
        raise SystemExit("not logged in: run `hf auth login`, or see what would be published with --dry_run")
    api = HfApi()
    has_card = (args.checkpoint / "README.md").is_file() or api.file_exists(args.repo_id, "README.md")
    card = None if has_card else generated_card(args)
    api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(args, class_name, folder)
        if card is not None:
            write_model_card(folder, card)
        # One commit: what is on the Hub is always the old checkpoint or the new one.
        commit = api.upload_folder(repo_id=args.repo_id, folder_path=folder, commit_message="Upload checkpoint")
    print(f"published {commit.oid}")


def main(args: argparse.Namespace):
    (class_name,) = AutoConfig.from_pretrained(args.checkpoint).architectures
    try:
        (show if args.dry_run else publish)(args, class_name)
    except (httpx.HTTPError, EntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(
            f"the Hub did not take part: {reason}\n--dry_run needs no login, and the network only for the card of a base model there"
        ) from None
    if not args.dry_run:
        auto_class = "AutoModel" + class_name.removeprefix("STLM").removeprefix("Model")
        print(f'{auto_class}.from_pretrained("{args.repo_id}", trust_remote_code=True)')


if __name__ == "__main__":
    with quiet_exit():
        main(args)
