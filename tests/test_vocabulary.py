# SPDX-License-Identifier: Apache-2.0
"""Smaller vocabularies of byte-level BPE."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.vocabulary import compress_vocabulary

from .tiny import TEXT, ids_of, tiny_config


ROOT = Path(__file__).parents[1]
PLAY = (ROOT / "examples" / "data" / "shakespeare.txt").read_text(encoding="utf-8")[:60_000]
CORPUS = PLAY.split("\n\n")
with gzip.open(ROOT / "tests" / "data" / "naughty_strings.jsonl.gz", "rt", encoding="utf-8") as lines:
    NAUGHTY = [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 3: byte-level BPE, a template that adds the start, a chat template, a token added at the end."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<bos>", "<eos>"])
    template = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=["<user>"],
        chat_template="{{ messages[0].content }}<eos>",
        model_max_length=77,
    )


def occurrences(tokenizer) -> Counter:
    return Counter(piece for text in CORPUS for piece in tokenizer.tokenize(text))


@pytest.mark.parametrize("coverage", [0.3, 0.8, 0.95, 1.0])
def test_the_fewest_pieces_that_cover_the_corpus_are_kept(tokenizer, coverage):
    report = compress_vocabulary(tokenizer, CORPUS, coverage)
    counts = occurrences(tokenizer)
    kept = set(report.tokenizer.get_vocab())
    covered = sum(count for piece, count in counts.items() if piece in kept)
    assert report.coverage == pytest.approx(covered / counts.total()) and report.coverage >= coverage
    # Down to the frequency at which enough is covered, and below it only bytes, added tokens and parts of kept pieces.
    upto, frequent = 0, set()
    for piece, count in counts.most_common():
        if upto >= coverage * counts.total():
            break
        frequent.add(piece)
        upto += count
    least = min(counts[piece] for piece in frequent)
    assert frequent <= kept | {piece for piece in frequent if counts[piece] == least}  # ties
    for piece in kept - frequent - {"<pad>", "<bos>", "<eos>", "<user>"}:
        assert len(piece) == 1 or counts[piece] == least or any(piece in longer for longer in frequent), piece
    assert (
        report.num_pieces
        == len(report.tokenizer)
        == len(report.kept_ids)
        <= report.num_pieces_before
        == len(tokenizer)
    )
    num_bytes = sum(len(text.encode()) for text in CORPUS)
    assert report.bytes_per_token == pytest.approx(num_bytes / occurrences(report.tokenizer).total())
    assert report.bytes_per_token_before == pytest.approx(num_bytes / counts.total())
    assert (report.bytes_per_token < report.bytes_per_token_before) == (coverage < 1)


def test_ids_are_those_of_the_rows_of_the_old_embedding(tokenizer):
    report = compress_vocabulary(tokenizer, CORPUS, 0.8)
    for new, old in enumerate(report.kept_ids):
        assert report.tokenizer.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)


def test_words_of_kept_pieces_are_tokenized_as_before_and_others_are_spelt(tokenizer):
    report = compress_vocabulary(tokenizer, CORPUS, 0.8)
    kept = set(report.tokenizer.get_vocab())
    words = [word for word, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(PLAY)]
    same = other = 0
    for word in set(words):
        before = [token.value for token in tokenizer.backend_tokenizer.model.tokenize(word)]
        after = [token.value for token in report.tokenizer.backend_tokenizer.model.tokenize(word)]
        assert "".join(after) == word
        if kept.issuperset(before):
            assert after == before
            same += 1
        else:
            assert after != before and kept.issuperset(after)
            other += 1
    assert same > 100 and other > 100


def test_every_text_comes_back_after_saving(tokenizer, tmp_path):
    compress_vocabulary(tokenizer, CORPUS, 0.5).tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [TEXT, PLAY, *NAUGHTY]:
        ids = loaded(text)["input_ids"]
        assert ids[0] == loaded.bos_token_id and max(ids) < len(loaded)
        assert loaded.decode(ids[1:]) == text


def test_special_tokens_and_settings_stay(tokenizer):
    compressed = compress_vocabulary(tokenizer, CORPUS, 0.5).tokenizer
    assert compressed.special_tokens_map == tokenizer.special_tokens_map
    assert compressed.all_special_tokens == tokenizer.all_special_tokens and "<user>" in compressed.all_special_tokens
    assert compressed("a")["input_ids"][0] == compressed.bos_token_id == compressed.convert_tokens_to_ids("<bos>")
    assert compressed.bos_token_id != tokenizer.bos_token_id
    assert compressed.decode(compressed("one<eos>")["input_ids"], skip_special_tokens=True) == "one"
    assert compressed(["a", "a long one"], padding=True)["input_ids"][0][0] == compressed.pad_token_id
    assert compressed.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<eos>"
    assert compressed.model_max_length == 77


def test_the_pieces_are_a_patch_vocabulary(tokenizer):
    report = compress_vocabulary(tokenizer, CORPUS, 0.8)
    pieces = report.patch_vocabulary.split()
    assert len(pieces) == report.num_pieces - 4 and not {"<pad>", "<bos>", "<eos>", "<user>"} & set(pieces)
    model = STLMForCausalLM(tiny_config(patching="vocabulary", patch_vocabulary=report.patch_vocabulary))
    assert model(torch.tensor([ids_of(PLAY[:200])])).logits.isfinite().all()


def test_bytes_and_generators_of_texts(tokenizer):
    whole = compress_vocabulary(tokenizer, CORPUS, 0.8)
    assert compress_vocabulary(tokenizer, [text.encode() for text in CORPUS], 0.8).kept_ids == whole.kept_ids
    with pytest.raises(ValueError, match="corpus is a generator, expected texts that can be read twice"):
        compress_vocabulary(tokenizer, (text for text in CORPUS), 0.8)
    with pytest.raises(ValueError, match="corpus is a str, expected texts"):
        compress_vocabulary(tokenizer, PLAY, 0.8)


def test_what_cannot_be_compressed_is_refused(tokenizer):
    for corpus in ([], [""]):
        with pytest.raises(ValueError, match="the corpus has no text"):
            compress_vocabulary(tokenizer, corpus, 0.9)
    for coverage in (0, 1.1, 90):
        with pytest.raises(ValueError, match=f"coverage={coverage} must be more than 0 and at most 1"):
            compress_vocabulary(tokenizer, CORPUS, coverage)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match="is WordLevel without 255 of the 256 bytes, expected byte-level BPE"):
        compress_vocabulary(words, CORPUS, 0.9)
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<0x00>": 0, "a": 1}, [])))
    with pytest.raises(ValueError, match="is BPE without 255 of the 256 bytes"):
        compress_vocabulary(sentencepiece, CORPUS, 0.9)
    clip = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, [], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match=r"marks pieces with \['</w>'\]"):
        compress_vocabulary(PreTrainedTokenizerFast(tokenizer_object=clip), CORPUS, 0.9)
