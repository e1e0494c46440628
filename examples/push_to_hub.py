# SPDX-License-Identifier: Apache-2.0
"""Publish a checkpoint folder: weights, code, tokenizer, generation config and model card.

    huggingface-cli login
    python examples/push_to_hub.py --checkpoint runs/finetuned --repo_id YOUR_NAME/stlm-shakespeare

The code goes along, so `AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)` works for people who
have not installed this package.
"""

import argparse

from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_stlm  # noqa: F401  (registers the Auto classes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder")
    parser.add_argument("--repo_id", required=True, help="YOUR_NAME/MODEL")
    parser.add_argument("--private", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint)
    model.push_to_hub(args.repo_id, private=args.private)
    tokenizer.push_to_hub(args.repo_id)
    documents = ["README.md", "loss.png", "results.json"]
    HfApi().upload_folder(repo_id=args.repo_id, folder_path=args.checkpoint, allow_patterns=documents)
    print(f'published: AutoModelForCausalLM.from_pretrained("{args.repo_id}", trust_remote_code=True)')


if __name__ == "__main__":
    main()
