# SPDX-License-Identifier: Apache-2.0
"""The table of features in RESULTS.md: STLM does what it says there, and no less."""

import json

import pytest

from .conformance.features import FEATURES
from .conformance.kits import KITS
from .conformance.table import RESULTS, ROOT, first_line, markdown


MISSING = {
    # Its pages are those of keys and values of tokens; the states of bytes and patches have other sizes.
    "continuous_batching": "ValueError: Invalid layer type: stlm_byte@modeling_stlm.cache_stlm",
}
SLOW = {"onnx_export", "dynamo_export", "compiled_step"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FEATURES])
@pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated:FutureWarning")
def test_feature(name):
    check = FEATURES[name][1]
    if name in MISSING:
        with pytest.raises(Exception) as error:  # noqa: PT011 (the reason is compared)
            check(KITS["STLM"])
        assert first_line(error.value) == MISSING[name]
    else:
        check(KITS["STLM"])


def test_the_table_is_that_of_the_results():
    results = json.loads(RESULTS.read_text())
    assert {name: list(found) for name, found in results["families"].items()} == {kit: list(FEATURES) for kit in KITS}
    assert {name: reason for name, reason in results["families"]["STLM"].items() if reason} == MISSING
    assert markdown(results) in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_checks_fail_where_they_should():
    # A model that ignores its cache, and one that sees padding, are caught.
    kit = KITS["STLM"]

    class Forgetful(type(kit)):
        def model(self, *args, **kwargs):
            model = super().model(*args, **kwargs)
            forward = model.forward

            def without_cache(*args, cache=None, attention_mask=None, **kwargs):
                return forward(*args, **kwargs)

            model.forward = without_cache
            return model

    broken = Forgetful(**vars(kit))
    for name in ("greedy", "beams", "batches", "padding"):
        with pytest.raises(AssertionError):
            FEATURES[name][1](broken)
