# SPDX-License-Identifier: Apache-2.0
"""`generate`, not overridden: every mode gives with the cache what it gives without."""

import pytest
import torch
from transformers import DynamicCache, GenerationMixin, TextIteratorStreamer, TextStreamer, set_seed

from modeling_stlm import STLMForCausalLM, STLMTokenizer

from .test_model import ALL, ROWS
from .tiny import MIXERS, PATCHING, RTOL, SHARING, TEXT, batch, ids_of, tiny_model


PROMPT = torch.tensor([ids_of(TEXT[:40])])
NEW = {"max_new_tokens": 24, "min_new_tokens": 24, "eos_token_id": None, "pad_token_id": 256}
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 0.7},
    "top_k_top_p_min_p": {"do_sample": True, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam_sample": {"num_beams": 3, "do_sample": True},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam_return_sequences": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 5},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 7},
}


def generate(model, inputs, use_cache, **options):
    set_seed(3)
    return model.generate(**inputs, **(NEW | options), use_cache=use_cache)


def test_generate_is_the_one_of_the_library():
    assert STLMForCausalLM.generate is GenerationMixin.generate
    assert "prepare_inputs_for_generation" not in vars(STLMForCausalLM)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_equals_itself_without_a_cache(mode):
    model = tiny_model(**MIXERS["both"])
    for inputs in ({"input_ids": PROMPT}, batch(ROWS, "left")):
        uncached = {name: value for name, value in mode.items() if name != "prefill_chunk_size"}
        assert torch.equal(generate(model, inputs, True, **mode), generate(model, inputs, False, **uncached))


@pytest.mark.parametrize("options", ALL)
@torch.no_grad()
def test_greedy_generation_of_ragged_rows_equals_each_row_uncached(options):
    """Eight left-padded prompts; tokens and logits against each row alone without a cache."""
    model = tiny_model(**options)
    texts = [
        ids_of(TEXT[start : start + length]) for start, length in zip(range(0, 80, 10), (1, 40, 7, 23, 64, 2, 16, 9))
    ]
    out = model.generate(
        **batch(texts, "left"),
        **(NEW | MODES["greedy"]),
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, dim=1)  # (B, new, V)
    for b, text in enumerate(texts):
        new = out.sequences[b, -24:]
        alone = model(torch.tensor([text + new.tolist()]), use_cache=False).logits[0, len(text) - 1 : -1]
        assert (logits[b] - alone).abs().max() <= RTOL * alone.abs().max()
        assert torch.equal(alone.argmax(-1), new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patching", "sharing"),
    [(patching, sharing) for patching in PATCHING for sharing in SHARING if patching in ("spacelike", "fixed")]
    + [(patching, "middle") for patching in ("vocabulary", "learned")],
)
@torch.no_grad()
def test_512_greedy_bytes_of_eight_ragged_rows_equal_each_row_uncached(patching, sharing, capsys):
    model = tiny_model(**PATCHING[patching], **SHARING[sharing])
    texts = [ids_of((TEXT * 2)[start : start + 3 + 13 * start]) for start in range(8)]
    new = {
        "max_new_tokens": 512,
        "min_new_tokens": 512,
        "eos_token_id": None,
        "pad_token_id": 256,
        "do_sample": False,
        "use_cache": True,
    }
    out = model.generate(**batch(texts, "left"), **new, output_logits=True, return_dict_in_generate=True)
    logits, largest = torch.stack(out.logits, dim=1), 0.0  # (B, 512, V)
    for b, text in enumerate(texts):
        written = out.sequences[b, -512:]
        alone = model(torch.tensor([text + written.tolist()]), use_cache=False).logits[0, len(text) - 1 : -1]
        assert torch.equal(alone.argmax(-1), written)
        largest = max(largest, ((logits[b] - alone).abs().max() / alone.abs().max()).item())
    with capsys.disabled():
        print(
            f"\n{patching}, {sharing}: 8 rows x 512 bytes equal, largest relative difference of logits {largest:.1e}"
        )
    assert largest <= RTOL


@pytest.mark.parametrize("patching", PATCHING)
@pytest.mark.parametrize("use_cache", [True, False])
def test_right_padded_prompts_generate_what_the_row_alone_generates(use_cache, patching):
    model = tiny_model(**PATCHING[patching], **MIXERS["both"])
    texts = [ids_of("The history of the"), ids_of("In this"), ids_of("x"), ids_of("Ends. ")]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    together = model.generate(**batch(texts, "right"), use_cache=use_cache, **options)[:, -12:]
    for row, text in zip(together, texts):
        alone = model.generate(torch.tensor([text]), use_cache=use_cache, **options)[0, -12:]
        assert torch.equal(row, alone)


def test_assisted_generation_equals_greedy():
    model = tiny_model(**MIXERS["both"])
    expected = generate(model, {"input_ids": PROMPT}, True, **MODES["greedy"])
    assistant = tiny_model(num_trunk_layers=1)
    for options in (
        {"assistant_model": assistant},
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 5},
        {"assistant_early_exit": model.config.num_hidden_layers - 1},
    ):
        assert torch.equal(generate(model, {"input_ids": PROMPT}, True, do_sample=False, **options), expected), options
    assert model.config.num_hidden_layers == len(model.config.layer_types)


def test_the_drafts_of_an_assistant_that_always_agrees_are_accepted():
    # If crop or the drafts went wrong, assisted decoding would still be right, only slower: count the forwards.
    model = tiny_model()
    calls = []
    model.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    generate(model, {"input_ids": PROMPT}, True, do_sample=False, assistant_model=tiny_model())
    assert len(calls) <= 16, f"{len(calls)} forwards for 24 bytes"


def test_chat_turns_can_go_on_with_one_cache():
    model = tiny_model(**MIXERS["both"])
    cache, ids = DynamicCache(config=model.config), PROMPT
    for turn in ("\nAnd then? ", "\nWhy so? "):
        ids = torch.cat([ids, torch.tensor([ids_of(turn)])], 1)
        expected = generate(model, {"input_ids": ids}, False, **MODES["greedy"])
        got = generate(model, {"input_ids": ids, "cache": cache}, True, **MODES["greedy"])
        assert torch.equal(got, expected)
        ids = got


def test_rows_that_ended_do_not_disturb_the_others():
    model = tiny_model()
    inputs = batch(ROWS, "left")
    free = generate(model, inputs, True, do_sample=False)
    num_prompt = inputs["input_ids"].shape[1]
    eos = int(free[1, num_prompt + 3])  # ends row 1 at its fourth new byte, others elsewhere or not at all
    ended = model.generate(
        **inputs, **(NEW | {"min_new_tokens": 0, "eos_token_id": eos}), do_sample=False, use_cache=True
    )
    for row, whole in zip(ended[:, num_prompt:].tolist(), free[:, num_prompt:].tolist()):
        stop = whole.index(eos) + 1 if eos in whole else len(whole)
        assert row[:stop] == whole[:stop] and set(row[stop:]) <= {256}


def test_generation_from_embeddings_equals_generation_from_ids():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    expected = generate(model, inputs, True, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    from_embeds = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(generate(model, from_embeds, True, do_sample=False), expected)


def test_stop_strings_stop_at_any_byte():
    model, tokenizer = tiny_model(), STLMTokenizer()
    only_bytes = {"do_sample": False, "suppress_tokens": list(range(256, 320))}
    text = generate(model, {"input_ids": PROMPT}, True, **only_bytes)[0, PROMPT.shape[1] :].tolist()
    ascii_pair = next(i for i in range(len(text) - 1) if max(text[i : i + 2]) < 128)
    stop = bytes(text[ascii_pair : ascii_pair + 2]).decode()
    stopping = {"stop_strings": [stop], "tokenizer": tokenizer, "min_new_tokens": 0}
    out = generate(model, {"input_ids": PROMPT}, True, **only_bytes, **stopping)
    assert bytes(out[0, PROMPT.shape[1] :].tolist()).decode("utf-8", "replace").endswith(stop)


def test_streamers_put_out_the_text_of_generate():
    model, tokenizer = tiny_model(), STLMTokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = generate(model, {"input_ids": PROMPT}, True, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(ids[0, PROMPT.shape[1] :], skip_special_tokens=True)


def test_streaming_never_shows_half_a_character():
    tokenizer, shown = STLMTokenizer(), []

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            shown.append(text)

    streamer = Recorder(tokenizer)
    text = "Zoë 東京都、сорок 😀😀 слов。\nEnd"
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert "".join(shown) == text
    assert not any("�" in piece for piece in shown)
