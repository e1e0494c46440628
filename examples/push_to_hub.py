# SPDX-License-Identifier: Apache-2.0
"""Publish a checkpoint folder in one commit: weights, code, tokenizer, generation config, curve, results, model card.

    hf auth login
    python examples/push_to_hub.py --checkpoint runs/finetuned --repo_id YOUR_NAME/stlm-shakespeare --licence apache-2.0

The code of the installed package goes along, so `AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)`
works for people who have not installed it. The card is the `README.md` of the folder; without one, the card of the
repository stays, and if there is none either, one is generated.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers import AutoConfig, AutoTokenizer

import modeling_stlm
from modeling_stlm.training.model_card import build_model_card, write_model_card


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder")
    parser.add_argument("--repo_id", required=True, help="YOUR_NAME/MODEL")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--licence", help="of the weights, as the Hub spells it, for a generated card")
    parser.add_argument("--language", help="of the training texts, as the Hub spells it, for a generated card")
    args = parser.parse_args()
    # The class that was saved: loaded as another, it would lose its head.
    (class_name,) = AutoConfig.from_pretrained(args.checkpoint).architectures
    model_class = getattr(modeling_stlm, class_name)
    api = HfApi()
    repo_id = api.create_repo(args.repo_id, private=args.private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model_class.from_pretrained(args.checkpoint).save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.checkpoint).save_pretrained(folder)
        # The weights as they are: loading may have changed their dtype.
        for name in ("model.safetensors", "README.md", "loss.png", "results.json"):
            if (args.checkpoint / name).is_file():
                shutil.copy(args.checkpoint / name, folder)
        if not (args.checkpoint / "README.md").is_file() and not api.file_exists(repo_id, "README.md"):
            card = build_model_card(folder, repo_id=repo_id, licence=args.licence, language=args.language)
            write_model_card(folder, card)
        # One commit: what is on the Hub is always the old checkpoint or the new one.
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload checkpoint")
    print(f"published {commit.oid}")
    auto_class = "AutoModel" + class_name.removeprefix("STLM").removeprefix("Model")
    print(f'{auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)')


if __name__ == "__main__":
    main()
