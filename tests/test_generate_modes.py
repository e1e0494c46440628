# SPDX-License-Identifier: Apache-2.0
"""What `generate` offers around the choice of bytes: outputs of every step, processors, stopping, assistants, batches."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    TokenizersBackend,
    WatermarkDetector,
    WatermarkingConfig,
    set_seed,
)

from modeling_stlm import STLMCommittee, STLMTokenizer

from .test_examples import ROOT
from .test_generate import PROMPT, ROWS, generate
from .tiny import MIXERS, PATCHING, TEXT, assert_equal, batch, ids_of, randomize, tiny_model


SPACE, E = 32, 101
OUTPUTS = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
GREEDY = {"do_sample": False}
SHAPING = {
    "typical": {"do_sample": True, "typical_p": 0.8},
    "eta": {"do_sample": True, "eta_cutoff": 1e-3},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 1e-3},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "bad_words": {"bad_words_ids": [[116, 104], [SPACE], [226, 128]]},
    "sequence_bias": {"sequence_bias": {(104, E): 5.0, (SPACE,): -3.0}},
    "suppress": {"suppress_tokens": [*range(256, 320)], "begin_suppress_tokens": [SPACE, E]},
    "forced_eos": {"forced_eos_token_id": 46},
    "decay": {"exponential_decay_length_penalty": (5, 1.1), "eos_token_id": SPACE, "min_new_tokens": 0},
    "guidance": {"guidance_scale": 2.0},
    "negative_prompt": {"guidance_scale": 2.0, "negative_prompt_ids": PROMPT[:, :9]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
    "synth_id": {
        "do_sample": True,
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[1, 2, 3, 4, 5, 6, 7], ngram_len=3),
    },
    "beams_that_end": {"num_beams": 3, "eos_token_id": [SPACE, 46], "min_new_tokens": 0, "length_penalty": -1.0},
    "beams_never_early": {"num_beams": 3, "early_stopping": "never", "eos_token_id": SPACE, "min_new_tokens": 4},
    "beams_renormalized": {"num_beams": 3, "do_sample": True, "renormalize_logits": True, "top_k": 9},
    "static": {"cache_implementation": "static"},
    "logits_of_the_whole_prompt": {"logits_to_keep": 0},
}


class Replay(LogitsProcessor):
    """Makes a model write `data` behind a prompt of `num_prompt` bytes."""

    def __init__(self, data: bytes, num_prompt: int):
        self.data, self.num_prompt = data, num_prompt

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.data[(input_ids.shape[1] - self.num_prompt) % len(self.data)]] = 0
        return forced


class RowNoise(LogitsProcessor):
    """Gumbel noise of each row's own generator: the greedy byte is then a sample that owes nothing to other rows."""

    def __init__(self, seeds: list[int]):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        noise = torch.stack([torch.rand(scores.shape[1], generator=generator) for generator in self.generators])
        return scores - torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))


@pytest.mark.parametrize("options", SHAPING.values(), ids=SHAPING)
def test_every_option_gives_with_a_cache_what_it_gives_without(options):
    model = tiny_model(**MIXERS["both"])
    options = GREEDY | options
    uncached = {name: value for name, value in options.items() if name != "cache_implementation"}
    inputs = [{"input_ids": PROMPT}]
    if "guidance_scale" not in options:  # the library runs its own prompt of one byte a row there, without a mask
        inputs.append(batch(ROWS, "left"))
    for each in inputs:
        assert torch.equal(generate(model, each, True, **options), generate(model, each, False, **uncached))


def test_options_do_what_they_say():
    model = tiny_model()
    inputs, start = {"input_ids": PROMPT}, PROMPT.shape[1]
    plain = generate(model, inputs, True, **GREEDY)[0, start:].tolist()
    banned = [plain[0:1], plain[3:5]]
    without = generate(model, inputs, True, **GREEDY, bad_words_ids=banned)[0, start:].tolist()
    assert banned[0][0] not in without
    assert all(without[i : i + 2] != banned[1] for i in range(len(without)))
    biased = generate(model, inputs, True, **GREEDY, sequence_bias={(ord("q"),): 1e4})[0, start:].tolist()
    assert biased == [ord("q")] * 24
    forced = generate(model, inputs, True, **GREEDY, forced_eos_token_id=46)[0, start:].tolist()
    assert forced == [*plain[:-1], 46]
    eos = plain[2]
    ended = generate(model, inputs, True, **GREEDY, eos_token_id=eos, min_new_tokens=0)[0, start:].tolist()
    assert ended == plain[: plain.index(eos) + 1]
    longer = generate(model, inputs, True, **GREEDY, eos_token_id=eos, min_new_tokens=9)[0, start:].tolist()
    assert len(longer) >= 9 and eos not in longer[:9]


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("inputs", [{"input_ids": PROMPT}, batch(ROWS, "left")], ids=["one", "ragged"])
def test_outputs_of_every_step_are_those_of_one_forward_pass(inputs, use_cache):
    model = tiny_model(**MIXERS["both"])
    model.set_attn_implementation("eager")
    num_prompt = inputs["input_ids"].shape[1]
    wanted = {"output_hidden_states": True, "output_attentions": True}
    out = generate(model, inputs, use_cache, **GREEDY, **OUTPUTS, **wanted)
    mask = torch.ones_like(out.sequences)
    if "attention_mask" in inputs:
        mask[:, :num_prompt] = inputs["attention_mask"]
    with torch.no_grad():
        full = model(out.sequences, attention_mask=mask, use_cache=False, **wanted)
    assert len(out.logits) == len(out.scores) == len(out.hidden_states) == len(out.attentions) == 24
    valid = mask == 1
    for step, (logits, scores, states, weights) in enumerate(
        zip(out.logits, out.scores, out.hidden_states, out.attentions)
    ):
        last = num_prompt + step - 1
        assert_equal(logits, full.logits[:, last])
        assert torch.equal(scores, logits)
        num_fed = num_prompt if step == 0 else 1 if use_cache else num_prompt + step
        assert len(states) == len(full.hidden_states) == model.config.num_byte_layers + 1
        for state, expected in zip(states, full.hidden_states):
            assert state.shape == (len(valid), num_fed, model.config.hidden_size)
            at = valid[:, last + 1 - num_fed : last + 1]
            assert_equal(state[at], expected[:, last + 1 - num_fed : last + 1][at])
        assert len(weights) == len(full.attentions) == 1
        assert weights[0].shape == (len(valid), model.config.num_attention_heads, num_fed, last + 1)
        assert_equal(weights[0][:, :, -1], full.attentions[0][:, :, last, : last + 1])
    if use_cache:
        assert out.cache.get_seq_length() == out.sequences.shape[1] - 1


def test_attentions_asked_of_sdpa_are_left_out_as_in_the_library():
    model = tiny_model(**MIXERS["both"])
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    wanted = {"return_dict_in_generate": True, "output_attentions": True}
    for each in (model, llama):
        assert each.config._attn_implementation == "sdpa"
        out = generate(each, {"input_ids": PROMPT}, True, **GREEDY, **wanted)
        assert out.attentions == ((),) * 24
    plain = generate(model, {"input_ids": PROMPT}, True, **GREEDY)
    assert torch.equal(generate(model, {"input_ids": PROMPT}, True, **GREEDY, **wanted).sequences, plain)


@pytest.mark.parametrize(
    "mode",
    [GREEDY, {"do_sample": True, "top_k": 0}, {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}],
    ids=["greedy", "sample", "beam"],
)
@torch.no_grad()
def test_scores_of_generation_are_the_log_probabilities_of_the_text(mode):
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    out = generate(model, inputs, True, **mode, **OUTPUTS)
    indices = getattr(out, "beam_indices", None)
    found = model.compute_transition_scores(out.sequences, out.scores, indices, normalize_logits=indices is None)
    mask = inputs["attention_mask"].repeat_interleave(len(out.sequences) // len(ROWS), 0)
    mask = torch.cat([mask, torch.ones_like(found, dtype=torch.long)], 1)
    log_probabilities = model(out.sequences, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    num_new = found.shape[1]
    expected = log_probabilities[:, -num_new - 1 : -1].gather(2, out.sequences[:, -num_new:, None])[..., 0]
    assert_equal(found, expected)
    if indices is not None:
        assert_equal(out.sequences_scores, expected.sum(1) / num_new)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("patching", PATCHING)
def test_the_logits_of_a_row_do_not_depend_on_the_rows_beside_it(patching, sampled):
    model = tiny_model(**PATCHING[patching], **MIXERS["both"])
    texts = [ids_of((TEXT * 2)[7 * b : 7 * b + 1 + (b * b) % 90]) for b in range(16)]

    def run(rows):
        noise = [RowNoise([100 + b for b in rows])] if sampled else []
        inputs = batch([texts[b] for b in rows], "left")
        out = generate(model, inputs, True, **GREEDY, **OUTPUTS, logits_processor=noise)
        return dict(zip(rows, zip(out.sequences[:, -24:], torch.stack(out.logits, 1))))

    alone = {b: run([b])[b] for b in range(16)}
    for rows in (list(range(16)), [9, 3, 15, 7, 0], [4, 2], [1, 12, 5, 8, 10, 11, 14, 6]):
        for b, (bytes_together, logits) in run(rows).items():
            assert torch.equal(bytes_together, alone[b][0])
            assert_equal(logits, alone[b][1])
    greedy = generate(model, batch(texts[:1], "left"), True, **GREEDY)[0, -24:]
    assert torch.equal(alone[0][0], greedy) != sampled, "noise changes the bytes, nothing else does"


@pytest.mark.parametrize(
    "options",
    [
        {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
        {"num_assistant_tokens": 9, "num_assistant_tokens_schedule": "heuristic"},
        {"assistant_confidence_threshold": 0.6},
        {"prompt_lookup_num_tokens": 4},
    ],
    ids=["constant", "heuristic", "confidence", "lookup"],
)
def test_assisted_generation_gives_the_logits_of_greedy_generation(options):
    model, assistant = tiny_model(**MIXERS["both"]), tiny_model(num_trunk_layers=1)
    if "prompt_lookup_num_tokens" not in options:
        for name, value in options.items():
            setattr(assistant.generation_config, name, value)
        options = {"assistant_model": assistant}
    wanted = {"output_hidden_states": True}
    expected = generate(model, {"input_ids": PROMPT}, True, **GREEDY, **OUTPUTS, **wanted)
    got = generate(model, {"input_ids": PROMPT}, True, **GREEDY, **OUTPUTS, **wanted, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert_equal(torch.stack(got.logits, 1), torch.stack(expected.logits, 1))
    assert_equal(torch.stack(got.scores, 1), torch.stack(expected.scores, 1))
    assert len(got.hidden_states) == 24
    for states, expected_states in zip(got.hidden_states, expected.hidden_states):
        assert_equal(states[-1], expected_states[-1])
    # One choice is left to chance, so sampling has to go the greedy way too.
    sampled = generate(model, {"input_ids": PROMPT}, True, do_sample=True, top_k=1, **options)
    assert torch.equal(sampled, expected.sequences)


def test_drafts_after_the_end_are_dropped():
    model = tiny_model(**MIXERS["both"])
    free = generate(model, {"input_ids": PROMPT}, True, **GREEDY)[0, PROMPT.shape[1] :].tolist()
    eos = next(byte for i, byte in enumerate(free) if i >= 5 and byte not in free[:i])
    end = {"eos_token_id": eos, "min_new_tokens": 0}
    expected = free[: free.index(eos) + 1]
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 6}):
        out = generate(model, {"input_ids": PROMPT}, True, **GREEDY, **end, **options)
        assert out[0, PROMPT.shape[1] :].tolist() == expected


def test_an_assistant_with_words_of_its_own_helps_to_the_same_bytes():
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"]))
    words = TokenizersBackend(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    assistant = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), hidden_size=16, intermediate_size=16, num_attention_heads=2)
    )
    model = AutoModelForCausalLM.from_pretrained(
        ROOT / "examples" / "checkpoints" / "stlm-3m", dtype=torch.float32, use_cache=True
    )
    prompt = {"input_ids": torch.tensor([ids_of("The history of the")])}
    expected = generate(model, prompt, True, **GREEDY)
    tokenizers = {"tokenizer": STLMTokenizer(), "assistant_tokenizer": words}
    got = generate(model, prompt, True, **GREEDY, assistant_model=randomize(assistant), **tokenizers)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_soft_prompts_are_gone_on_with_as_without_a_cache(beams):
    # Embeddings of no byte, as prompt tuning makes them.
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embeds = torch.cat([torch.randn(len(ROWS), 3, embeds.shape[2]), embeds], 1)
    mask = torch.cat([torch.ones(len(ROWS), 3, dtype=torch.long), inputs["attention_mask"]], 1)
    mode = {"inputs_embeds": embeds, "attention_mask": mask}, {"do_sample": False, "num_beams": beams}
    assert torch.equal(generate(model, mode[0], True, **mode[1]), generate(model, mode[0], False, **mode[1]))


@pytest.mark.parametrize("start", ["ids", "embeds"])
def test_generation_goes_on_from_the_cache_it_returned(start):
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    at_once = generate(model, inputs, True, **GREEDY, **OUTPUTS)
    some = {"max_new_tokens": 5, "min_new_tokens": 5}
    first = {"attention_mask": inputs["attention_mask"]}
    if start == "ids":
        first["input_ids"] = inputs["input_ids"]
    else:
        first["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    begun = generate(model, first, True, **GREEDY, **some, return_dict_in_generate=True)
    ids = begun.sequences if start == "ids" else torch.cat([inputs["input_ids"], begun.sequences], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -5:])], 1)
    more = {"input_ids": ids, "attention_mask": mask, "cache": begun.cache}
    rest = {"max_new_tokens": 19, "min_new_tokens": 19}
    ended = generate(model, more, True, **GREEDY, **rest, **OUTPUTS)
    assert torch.equal(ended.sequences, at_once.sequences)
    assert_equal(torch.stack(ended.logits, 1), torch.stack(at_once.logits[5:], 1))
    assert ended.cache is begun.cache


def test_position_ids_given_by_hand_change_nothing():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    got = generate(model, inputs | {"position_ids": positions}, True, **GREEDY)
    assert torch.equal(got, generate(model, inputs, True, **GREEDY))


def test_eager_and_sdpa_attention_generate_the_same_bytes():
    model = tiny_model(**MIXERS["attention"])
    inputs = batch(ROWS, "left")
    expected = generate(model, inputs, True, **GREEDY, **OUTPUTS)
    model.set_attn_implementation("eager")
    got = generate(model, inputs, True, **GREEDY, **OUTPUTS)
    assert torch.equal(got.sequences, expected.sequences)
    assert_equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_stop_string_stops_at_its_last_byte_wherever_that_is():
    # Every substring of up to three characters: inside and at the end of patches and of characters of two to four bytes.
    text = "Zoë ëé 東京, a 😀😁!"
    model, tokenizer = tiny_model(), STLMTokenizer()
    stops = {text[i : i + n] for i in range(len(text)) for n in (1, 2, 3)}
    assert "é" in stops and "京" in stops  # their first bytes are those of the ë and 東 before them
    for stop in sorted(stops):
        processor = [Replay(text.encode(), PROMPT.shape[1])]
        out = generate(
            model,
            {"input_ids": PROMPT},
            True,
            **GREEDY,
            logits_processor=processor,
            stop_strings=[stop, "never written"],
            tokenizer=tokenizer,
            min_new_tokens=0,
            max_new_tokens=40,
        )
        written = bytes(out[0, PROMPT.shape[1] :].tolist())
        assert written == text.encode()[: text.encode().index(stop.encode()) + len(stop.encode())], stop


class StopAtLowByte(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] < 64


def test_rows_stop_by_a_criterion_of_the_user():
    model = tiny_model()
    inputs = batch(ROWS, "left")
    free = generate(model, inputs, True, **GREEDY)[:, -24:].tolist()
    ends = [next((t + 1 for t, byte in enumerate(row) if byte < 64), 24) for row in free]
    assert len(set(ends)) > 1, "rows stop at different bytes"
    # A row that stopped is padded, which takes an end-of-text id.
    stopping = {"stopping_criteria": [StopAtLowByte()], "eos_token_id": 300, "min_new_tokens": 0}
    stopped = generate(model, inputs, True, **GREEDY, **stopping)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [len(row) for row in stopped] == [max(ends)] * len(ROWS)
    for row, whole, end in zip(stopped, free, ends):
        assert row[:end] == whole[:end] and set(row[end:]) <= {256}


def test_the_detector_finds_the_watermark():
    model = tiny_model()
    config = WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")
    inputs = {"input_ids": PROMPT}
    long = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": True}
    detector = WatermarkDetector(model_config=model.config, device="cpu", watermarking_config=config)
    marked = generate(model, inputs, True, **long, watermarking_config=config)[:, PROMPT.shape[1] :]
    plain = generate(model, inputs, True, **long)[:, PROMPT.shape[1] :]
    assert detector(marked, return_dict=True).prediction.all()
    assert not detector(plain, return_dict=True).prediction.any()


def test_generation_without_a_prompt_starts_at_bos():
    model = tiny_model()
    new = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    out = model.generate(**new)
    assert out[0, 0] == model.config.bos_token_id == 257
    assert torch.equal(out, model.generate(torch.tensor([[257]]), **new))


def test_the_shipped_generation_config_samples_with_temperature():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "checkpoints" / "stlm-3m", dtype=torch.float32)
    prompt = torch.tensor([ids_of("The history of the")])
    set_seed(5)
    by_default = model.generate(prompt, max_new_tokens=30)
    set_seed(5)
    told = model.generate(
        prompt, max_new_tokens=30, do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=258, use_cache=False
    )
    assert torch.equal(by_default, told)
    # lm-evaluation-harness asks for lengths in this way.
    assert model.generate(prompt, max_length=40, min_length=40).shape[1] == 40
    assert model.generate(prompt, max_length=40, max_new_tokens=3, min_new_tokens=3).shape[1] == prompt.shape[1] + 3


def test_a_loop_of_the_user_gets_a_cache_and_inputs_that_fit():
    def own_greedy(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
        for _ in range(24):
            prepared = model.prepare_inputs_for_generation(input_ids, next_sequence_length=None, **inputs)
            cached = inputs["cache"].get_seq_length()
            prepared["input_ids"] = input_ids[:, cached:]
            outputs = model(**prepared)
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            input_ids = torch.cat([input_ids, outputs.logits[:, -1:].argmax(-1)], 1)
        return input_ids

    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    got = generate(model, inputs, True, **GREEDY, custom_generate=own_greedy)
    assert torch.equal(got, generate(model, inputs, False, **GREEDY))


def test_drafts_are_streamed_in_order_and_batches_are_refused():
    shown, tokenizer = [], STLMTokenizer()

    class Recorder(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            shown.append(text)

    model = tiny_model()
    streamer = Recorder(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = generate(model, {"input_ids": PROMPT}, True, **GREEDY, streamer=streamer, assistant_model=model)
    assert "".join(shown) == tokenizer.decode(ids[0, PROMPT.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ValueError, match="batch size 1"):
        generate(model, batch(ROWS, "left"), True, **GREEDY, streamer=streamer)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"cache_implementation": "quantized"}, ValueError, "only full attention layers"),
        ({"cache_implementation": "paged"}, ValueError, "Invalid layer type"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, ValueError, "group-beam-search"),
        ({"num_beams": 4, "force_words_ids": [[97]]}, ValueError, "constrained-beam-search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "contrastive-search"),
        ({"dola_layers": "high"}, ValueError, "transformers-community/dola"),
    ],
    ids=["quantized", "paged", "groups", "constraints", "contrastive", "dola"],
)
def test_what_the_model_or_the_library_cannot_do_is_refused_in_words(options, error, words):
    # Modes of transformers-community are no longer in the library: they load code from the Hub.
    with pytest.raises(error, match=words):
        generate(tiny_model(), {"input_ids": PROMPT}, True, **(GREEDY | options))


def test_continuous_batching_is_refused_in_words():
    with pytest.raises(ValueError, match="Invalid layer type: stlm_byte@"):
        tiny_model().generate_batch([ids_of("One"), ids_of("Two")])


def test_caches_of_generate_have_the_slots_of_the_config():
    model = tiny_model(**MIXERS["both"])
    inputs = batch(ROWS, "left")
    out = generate(model, inputs, True, **GREEDY, return_dict_in_generate=True)
    assert type(out.cache) is DynamicCache
    assert len(out.cache.layers) == model.config.num_hidden_layers
    assert generate(model, inputs, False, **GREEDY, return_dict_in_generate=True).cache is None


def test_leaving_early_is_refused_in_words():
    model = tiny_model()
    expected = model(PROMPT).logits
    for exit in (1, model.config.num_byte_layers):
        with pytest.raises(ValueError, match=f"assistant_early_exit={exit} counts cache slots, expected at least 4"):
            generate(model, {"input_ids": PROMPT}, True, **GREEDY, assistant_early_exit=exit)
        assert model.config.num_hidden_layers == len(tiny_model().config.layer_types)
        assert torch.equal(model(PROMPT).logits, expected)

    for count in (1, 4):  # in the first draft, or in a later one
        slots = []

        def fails(ids, scores, slots=slots, count=count):
            slots.append(model.config.num_hidden_layers)
            if len(slots) == count:
                raise InterruptedError
            return scores

        with pytest.raises(InterruptedError):
            generate(model, {"input_ids": PROMPT}, True, **GREEDY, assistant_early_exit=4, logits_processor=[fails])
        assert slots[-1] == 4 and model.config.num_hidden_layers == len(tiny_model().config.layer_types)
        assert torch.equal(model(PROMPT).logits, expected)
    committee = STLMCommittee.from_members([tiny_model(), tiny_model()])
    with pytest.raises(ValueError, match="a committee has no assistant_early_exit"):
        committee.generate(PROMPT, **GREEDY, use_cache=True, assistant_early_exit=4)
