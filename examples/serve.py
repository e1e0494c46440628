# SPDX-License-Identifier: Apache-2.0
r"""`transformers serve` for STLM checkpoints: the same server, options and API (that of OpenAI).

    pip install -c constraints.txt -e '.[serve]'
    python examples/serve.py examples/checkpoints/stlm-3m --port 8000
    curl localhost:8000/v1/completions --header 'Content-Type: application/json' \
        --data '{"model": "examples/checkpoints/stlm-3m", "prompt": "The history of the", "temperature": 0}'
    transformers chat examples/checkpoints/stlm-3m http://localhost:8000/v1

`transformers serve` alone looks for the class that `config.json` names inside the library only, even with
`--trust-remote-code`, so no class from outside can be served (transformers 5.24). This script puts it there. It also refuses
in words what the library would ignore (several answers, log-probabilities) or answer with status 500 (an empty prompt).
"""

import argparse

from inputs import HelpFormatter, causal_checkpoint, require


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=causal_checkpoint, help="folder or Hub id, comes first")
    parser.epilog = "All other options are those of the library: `transformers serve --help` shows them."
    return parser.parse_known_args()


if __name__ == "__main__":
    args, options = parse_arguments()
    require("serve", "fastapi", "uvicorn")

import transformers
from fastapi import HTTPException
from transformers.cli.serving.utils import BaseHandler
from transformers.cli.transformers import app

import modeling_stlm


def objection(body: dict) -> str | None:
    """Why a request cannot be served as it was asked."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            return f"{name}={body[name]} is not supported: there is one answer per request"
    for name in ("logprobs", "top_logprobs", "echo"):
        if body.get(name) is not None and body[name] is not False:
            return f"{name} is not supported"
    for name in ("prompt", "messages"):
        if name in body and not body[name]:
            return f"{name} is empty: the model needs at least one byte to go on from, such as a line end"
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) is not None and body[name] < 1:
            return f"{name}={body[name]} must be at least 1"
    if body.get("temperature") is not None and body["temperature"] < 0:
        return f"temperature={body['temperature']} must be at least 0"
    return None


def validate(handler: BaseHandler, body: dict, of_the_library=BaseHandler._validate_request) -> None:
    of_the_library(handler, body)
    if reason := objection(body):
        raise HTTPException(status_code=422, detail=reason)


if __name__ == "__main__":
    transformers.STLMForCausalLM = modeling_stlm.STLMForCausalLM
    BaseHandler._validate_request = validate
    app(["serve", args.checkpoint, *options])
