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

import sys

import transformers
from transformers.cli.transformers import app

import modeling_stlm


if __name__ == "__main__":
    transformers.STLMForCausalLM = modeling_stlm.STLMForCausalLM
    app(["serve", *sys.argv[1:]])
