# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` for STLM checkpoints: the same server, options and API (that of OpenAI).

    pip install -c constraints.txt -e '.[serve]'
    python examples/serve.py examples/checkpoints/stlm-3m --port 8000
    curl localhost:8000/v1/completions --header 'Content-Type: application/json' \
        --data '{"model": "examples/checkpoints/stlm-3m", "prompt": "The history of the", "temperature": 0}'
    transformers chat examples/checkpoints/stlm-3m http://localhost:8000/v1

`transformers serve` alone looks for the class that `config.json` names inside the library only, even with
`--trust-remote-code`, so no class from outside can be served (transformers 5.23). This script puts it there.
"""

import argparse

from inputs import HelpFormatter, checkpoint


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=checkpoint, help="folder or Hub id")
    parser.epilog = "All other options are those of the library: `transformers serve --help` shows them."
    return parser.parse_known_args()


if __name__ == "__main__":
    args, options = parse_arguments()

import transformers
from transformers.cli.transformers import app

import modeling_stlm


if __name__ == "__main__":
    transformers.STLMForCausalLM = modeling_stlm.STLMForCausalLM
    app(["serve", args.checkpoint, *options])
