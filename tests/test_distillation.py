# SPDX-License-Identifier: Apache-2.0
"""Teachers of bytes against brute force, what is stored of them, and training that follows them."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_stlm import STLMCommittee, STLMForCausalLM, STLMForMaskedLM
from modeling_stlm.training import distillation
from modeling_stlm.training.corpus import PackedWindows, write_corpus
from modeling_stlm.training.distillation import (
    DistillationTrainer,
    StoredTeacher,
    SubwordTeacher,
    divergence,
    store_teacher,
    teacher_log_probs,
)
from modeling_stlm.training.model_card import build_model_card

from .hub_server import metadata_errors
from .test_distributed import run
from .test_examples import ROOT
from .test_examples import refused as told_by
from .test_examples import run as run_example
from .test_examples import small_text as small_text  # a fixture
from .tiny import TEXT, batch, randomize, tiny_config, tiny_model
from .trainers import RAGGED, TOKENIZER, arguments, losses, weights


WORDS = "the trunk runs there, and then the other thing runs. Zoë saw 東京. " * 3
# Starts of words, ends inside characters, bytes of no character, and text after them.
HARD = "the theme, 東京 then".encode() + b"\xe6\x9d" + b" \xff there"


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    bpe.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>")
    tokenizer.add_tokens(["the other"])  # a token of the text, outside BPE
    return tokenizer


def byte_fallback_bpe() -> PreTrainedTokenizerFast:
    """BPE over characters with byte fallback and a space before the text, as SentencePiece writes it for Llama."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abdehinorstu"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("r", "e"), ("the", "re"), ("\u2581the", "re"), ("r", "u")]
    pieces += ["".join(pair) for pair in merges]
    bpe = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", unk_token="<unk>")


def llama(tokenizer, seed: int = 0, **options) -> LlamaForCausalLM:
    """A tiny random model; a few ids more than the tokenizer has, as real models pad their vocabularies."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer) + 5, initializer_range=0.3, **(sizes | options))
    return LlamaForCausalLM(config).eval()


def spell(text: bytes, bytes_of: dict[int, bytes]) -> list[int]:
    """Longest tokens first; of two with the same bytes not the one that stands for a single byte, `<0x..>`."""
    ids = []
    while text:
        fitting = [i for i, token in bytes_of.items() if text.startswith(token)]
        ids.append(max(fitting, key=lambda i: (len(bytes_of[i]), i)))
        text = text[len(bytes_of[ids[-1]]) :]
    return ids


class BruteForce:
    """The definition, one model call for each prefix, and sums over the whole vocabulary."""

    def __init__(self, model, tokenizer, text: bytes):
        fast = tokenizer.backend_tokenizer
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        is_byte_level = isinstance(fast.decoder, decoders.ByteLevel)
        self.bytes_of = {}
        for token, i in tokenizer.get_vocab().items():
            if token == "the other":
                self.bytes_of[i] = b"the other"
            elif token.startswith("<0x"):
                self.bytes_of[i] = bytes.fromhex(token[3:5])
            elif token not in tokenizer.all_special_tokens:
                plain = token.replace("\u2581", " ").encode()
                self.bytes_of[i] = bytes(byte_of[c] for c in token) if is_byte_level else plain
        self.text = text if is_byte_level else b" " + text
        self.model, self.tokenizer, self.is_byte_level = model, tokenizer, is_byte_level
        self.given = [self.token_probabilities(i) for i in range(len(self.text))]
        self.ends = [1.0] + [0.0] * len(self.text)
        for i, probabilities in enumerate(self.given):
            for token, probability in probabilities.items():
                if self.text.startswith(self.bytes_of[token], i):
                    self.ends[i + len(self.bytes_of[token])] += self.ends[i] * probability

    def token_probabilities(self, i: int) -> dict[int, float]:
        """After the first bytes of the text, as the tokenizer writes what of them is characters."""
        so_far = self.text[:i]
        text = so_far if self.is_byte_level else so_far[1:]
        good = text.decode(errors="replace").split("\ufffd")[0]
        ids = self.tokenizer(good, add_special_tokens=False)["input_ids"] if good else []
        rest = text[len(good.encode()) :] if good else so_far
        history = [self.tokenizer.bos_token_id, *ids, *spell(rest, self.bytes_of)]
        with torch.no_grad():
            logits = self.model(torch.tensor([history])).logits[0, -1].double()
        tokens = list(self.bytes_of)
        return dict(zip(tokens, logits[tokens].softmax(-1).tolist()))

    def starts(self) -> list[list[float]]:
        """Probability that a text starts with the first bytes of this one, none to all but one, and each of the 256."""
        found = [[0.0] * 256 for _ in self.text]
        for i, probabilities in enumerate(self.given):
            for token, probability in probabilities.items():
                for n, byte in enumerate(self.bytes_of[token]):
                    found[i + n][byte] += self.ends[i] * probability
                    if self.text[i + n : i + n + 1] != bytes([byte]) or i + n + 1 == len(self.text):
                        break
        return found


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe])
@pytest.mark.parametrize("chunk_bytes", [128, 5])
def test_next_byte_probabilities_are_the_sums_over_all_tokens(make, chunk_bytes, monkeypatch):
    monkeypatch.setattr(distillation, "CHUNK_BYTES", chunk_bytes)
    tokenizer = make()
    model = llama(tokenizer)
    found = SubwordTeacher(model, tokenizer).next_byte_log_probs(HARD)
    assert found.shape == (len(HARD), 256) and found.dtype == torch.float32
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(HARD)))
    brute = BruteForce(model, tokenizer, HARD)
    starts = torch.tensor(brute.starts(), dtype=torch.double)[-len(HARD) :]
    expected = starts / starts.sum(-1, keepdim=True)
    torch.testing.assert_close(found.exp().double(), expected, atol=2e-6, rtol=1e-3)
    # They multiply up to the probability of the text, given the space that SentencePiece puts before it.
    total = found[range(len(HARD)), list(HARD)].double().sum().item()
    assert total == pytest.approx((starts[-1, HARD[-1]] / starts[0].sum()).log().item(), rel=1e-5)


def test_a_model_without_memory_gives_the_sum_over_all_ways_to_write_a_text():
    """Without a history all definitions agree, so token sequences can be enumerated one by one."""
    tokenizer = byte_level_bpe()
    model = llama(tokenizer)
    torch.nn.init.zeros_(model.model.norm.weight)  # all logits zero ...
    teacher = SubwordTeacher(model, tokenizer)
    text = b"the there"
    share = 1 / len(teacher.bytes_of)

    def covers(rest: bytes) -> float:  # of all sequences of tokens that start with `rest`
        return sum(
            share * (1 if token.startswith(rest) else covers(rest[len(token) :]))
            for token in teacher.bytes_of.values()
            if token.startswith(rest) or rest.startswith(token)
        )

    found = teacher.next_byte_log_probs(text)
    assert found[range(len(text)), list(text)].sum().item() == pytest.approx(math.log(covers(text)), rel=1e-5)


def test_texts_of_no_and_of_one_byte():
    teacher = SubwordTeacher(llama(byte_level_bpe()), byte_level_bpe())
    assert teacher.next_byte_log_probs(b"").shape == (0, 256)
    longer = teacher.next_byte_log_probs(b"the")
    torch.testing.assert_close(teacher.next_byte_log_probs(b"t"), longer[:1])
    torch.testing.assert_close(teacher.next_byte_log_probs(b"the other")[:3], longer)  # the future changes nothing


def test_teachers_that_cannot_spell_are_refused():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<unk>")
    with pytest.raises(ValueError, match=r"can spell all bytes: .* 256 of these are missing, such as <0x00>"):
        SubwordTeacher(llama(words), words)
    tokenizer = byte_level_bpe()
    bytes_missing = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(without(tokenizer, "\u0106")), bos_token="<s>"
    )  # without a token for byte 6, as SmolLM2
    teacher = SubwordTeacher(llama(bytes_missing), bytes_missing)
    assert teacher.next_byte_log_probs(b"the")[:, 6].eq(-torch.inf).all()
    with pytest.raises(ValueError, match=r"no token: b'\\x06'"):
        teacher.next_byte_log_probs(b"the\x06")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="keeps every byte, but it ends b'T' with the tokens"):
        SubwordTeacher(llama(tokenizer), tokenizer).next_byte_log_probs(b"The")
    tokenizer = byte_level_bpe()
    with pytest.raises(ValueError, match="reads at most 4 tokens, the text of 40 bytes has"):
        SubwordTeacher(llama(tokenizer, max_position_embeddings=4), tokenizer).next_byte_log_probs(b"xy" * 20)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="give start_id"):
        SubwordTeacher(llama(tokenizer), tokenizer)
    assert SubwordTeacher(llama(tokenizer), tokenizer, start_id=3).next_byte_log_probs(b"a").isfinite().all()


def without(tokenizer, character: str) -> str:
    """A tokenizer as JSON, without the tokens that contain `character`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = [token for token in state["model"]["vocab"] if character not in token]
    state["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if character not in "".join(pair)]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    return json.dumps(state)


class Digits:
    """A teacher that expects the digit of the number of bytes so far."""

    def next_byte_log_probs(self, text: bytes) -> torch.Tensor:
        rows = torch.full((len(text), 256), -torch.inf)
        rows[range(len(text)), [48 + i % 10 for i in range(len(text))]] = 0
        return rows


def expected_digits(row: list[int], starts: set[int]) -> list[int | None]:
    """After each id of a row the digit that `Digits` expects, `None` where no byte of the same text follows."""
    count, digits = 0, []
    for i in range(len(row)):
        count = 0 if row[i] > 255 else 1 if i in starts else count + 1
        follows = i + 1 < len(row) and row[i + 1] < 256
        digits.append(None if not follows else 48 if i + 1 in starts else 48 + count % 10)
    return digits


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_teacher_of_texts_sees_each_text_of_a_row_from_its_start(side):
    rows = [[*b"abc", 258, 257, *b"de", 258], [*b"xyz"], [257, *b"12345678901"]]
    inputs = batch(rows, side)
    found = teacher_log_probs(Digits(), inputs)
    for i, row in enumerate(rows):
        at = inputs["attention_mask"][i].nonzero()[:, 0]
        for position, digit in zip(at, expected_digits(row, set())):
            said = found[i, position].exp().nonzero()[:, 0].tolist()
            assert said == ([] if digit is None else [digit])
    packed = {
        "input_ids": torch.tensor([[*b"abcde", 257, *b"fgh"]]),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2, 3]]),
    }
    found = teacher_log_probs(Digits(), packed)[0]
    assert [row.exp().nonzero()[:, 0].tolist() for row in found] == [
        [] if digit is None else [digit] for digit in expected_digits(packed["input_ids"][0].tolist(), {2})
    ]


def test_stored_outputs_are_the_sixteen_likeliest_bytes_and_the_rest(tmp_path):
    teacher = tiny_model()
    rows = [{"input_ids": row} for row in (*RAGGED, RAGGED[0], [*b"ab", 257, *b"cd"])]  # one of them twice
    path = store_teacher(tmp_path / "folder" / "teacher.bin", teacher, rows)
    positions = sum(map(len, RAGGED)) + 5
    assert path.stat().st_size == 50 * positions
    assert sorted(file.name for file in path.parent.iterdir()) == ["teacher.bin", "teacher.bin.index.npy"]
    stored = StoredTeacher(path)
    for side in ("left", "right"):
        inputs = batch(RAGGED, side)
        valid = inputs["attention_mask"].bool()
        found, said = teacher_log_probs(stored, inputs)[valid], teacher_log_probs(teacher, inputs)[valid]
        known = found > -torch.inf
        assert (known.sum(-1) == 16).all()
        assert (
            said.masked_fill(known, -torch.inf).max(-1)[0] <= said.masked_fill(~known, torch.inf).min(-1)[0] + 1e-6
        ).all()
        torch.testing.assert_close(found[known], said[known], atol=5e-3, rtol=1e-3)  # float16
        mass = said.exp().masked_fill(~known, 0).sum(-1)
        torch.testing.assert_close(found.exp().sum(-1), mass, atol=2e-3, rtol=0)
        assert mass.min() < 0.9


def test_where_a_teacher_gives_no_probabilities_none_are_stored(tmp_path):
    rows = [[*b"abc", 258, 257, *b"de", 258], [*b"xyz"]]
    stored = StoredTeacher(store_teacher(tmp_path / "teacher.bin", Digits(), [{"input_ids": row} for row in rows]))
    inputs = batch(rows, "left")
    assert torch.equal(teacher_log_probs(stored, inputs), teacher_log_probs(Digits(), inputs))


class Interrupted(tuple):
    """Rows, after the last of which the process is stopped."""

    def __iter__(self):
        yield from super().__iter__()
        raise KeyboardInterrupt


class Counted:
    """Counts the texts that a teacher reads."""

    def __init__(self, teacher):
        self.teacher, self.count = teacher, 0

    def next_byte_log_probs(self, text: bytes) -> torch.Tensor:
        self.count += 1
        return self.teacher.next_byte_log_probs(text)


def test_resumed_storing_is_the_uninterrupted_one(tmp_path):
    rows = [{"input_ids": list(text)} for text in (b"the trunk", b"runs there", b"and then", b"the other")]
    subwords = SubwordTeacher(llama(byte_level_bpe()), byte_level_bpe())
    whole = store_teacher(tmp_path / "whole.bin", subwords, rows)
    path = tmp_path / "cut.bin"
    with pytest.raises(KeyboardInterrupt):
        store_teacher(path, subwords, Interrupted(rows[:3]))
    assert [file.name for file in tmp_path.glob("cut*")] == ["cut.bin.rows"]
    kept = sorted((tmp_path / "cut.bin.rows").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:-1])  # as after a crash: one row is cut
    kept[1].write_bytes(b"")  # and one is empty
    with pytest.raises(ValueError, match=r"cut\.bin\.rows are of another teacher: .* differ by .* at most 0\.01"):
        store_teacher(path, SubwordTeacher(llama(byte_level_bpe(), seed=1), byte_level_bpe()), rows)
    counted = Counted(subwords)
    store_teacher(path, counted, rows)
    assert counted.count <= 4  # the one row left once more, to compare, and those that are not whole
    assert path.read_bytes() == whole.read_bytes()
    first, second = (np.load(distillation.index_path(name)) for name in (path, whole))
    assert np.array_equal(first, second)
    assert sorted(file.name for file in tmp_path.glob("cut*")) == ["cut.bin", "cut.bin.index.npy"]


def test_rows_that_are_there_are_not_read_again(tmp_path):
    rows = [{"input_ids": list(text)} for text in (b"the trunk", b"runs there", b"and then", b"the other")]
    counted = Counted(Digits())
    with pytest.raises(KeyboardInterrupt):
        store_teacher(tmp_path / "teacher.bin", counted, Interrupted(rows[:3]))
    assert counted.count == 3
    store_teacher(tmp_path / "teacher.bin", counted, rows)
    assert counted.count == 3 + 2  # the last one, and the first to compare


def test_empty_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rows to write to .*: the dataset is empty"):
        store_teacher(tmp_path / "none.bin", tiny_model(), [])
    assert list(tmp_path.iterdir()) == []
    path = store_teacher(tmp_path / "teacher.bin", tiny_model(), [{"input_ids": RAGGED[0]}])
    with pytest.raises(ValueError, match="no outputs for the row that starts with b'one two'"):
        teacher_log_probs(StoredTeacher(path), {"input_ids": torch.tensor([RAGGED[1]])})
    (tmp_path / "foreign.bin").write_bytes(b"x" * 50)
    with pytest.raises(
        ValueError, match=r"foreign\.bin is no file of teacher outputs: .* there is no such list, got 50"
    ):
        StoredTeacher(tmp_path / "foreign.bin")
    np.save(tmp_path / "foreign.bin.index.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"foreign\.bin is no file of teacher outputs"):
        StoredTeacher(tmp_path / "foreign.bin")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"lists, {50 * len(RAGGED[0])}, got 0 bytes"):
        StoredTeacher(path)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_that_of_the_library_and_lumps_what_is_unknown(temperature):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, size, generator=generator) * 3 for size in (320, 256))
    logits.requires_grad_()
    student = (logits[:, :256] / temperature).log_softmax(-1)
    target = (teacher / temperature).log_softmax(-1)
    expected = torch.nn.functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
    found = divergence(teacher.log_softmax(-1), logits, temperature)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    # d KL / d logit = (q - p) / T
    wanted = torch.nn.functional.pad((student.exp() - target.exp()) / temperature, (0, 64))
    torch.testing.assert_close(gradient, wanted.detach(), atol=1e-5, rtol=0)
    found = divergence(torch.full((7, 256), -torch.inf), logits, temperature)  # a teacher without probabilities
    torch.testing.assert_close(found, torch.zeros(7), atol=1e-5, rtol=0)
    assert torch.autograd.grad(found.sum(), logits)[0].abs().max() < 1e-5
    if temperature == 1:
        log_probs = teacher.log_softmax(-1)
        known = torch.zeros_like(log_probs, dtype=torch.bool).scatter(1, log_probs.topk(16)[1], True)
        found = divergence(log_probs.masked_fill(~known, -torch.inf), logits)
        p, q = (
            torch.cat([x.exp()[known].view(7, 16), x.exp().masked_fill(known, 0).sum(-1, keepdim=True)], 1)
            for x in (log_probs, student)
        )
        torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), atol=1e-5, rtol=1e-5)
        assert torch.autograd.grad(found.sum(), logits)[0].isfinite().all()
        certain = torch.full((7, 256), -torch.inf)
        certain[:, 3] = 0  # nothing is left for the rest
        found = divergence(certain, logits)
        torch.testing.assert_close(found, -student[:, 3])
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        torch.testing.assert_close(gradient[:, :256], student.exp() - certain.exp())


def data() -> list[dict]:
    return [
        {"input_ids": row, "labels": row} for row in (*RAGGED, [257, *b"the end", 258], [*b"one", 258, 257, *b"two"])
    ]


class Padded:
    """Ragged rows."""

    def __call__(self, rows):
        inputs = batch([row["input_ids"] for row in rows], "right")
        return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def distil(folder, teacher, student=None, resume=False, **options):
    settings = {name: options.pop(name) for name in ("teacher_weight", "temperature") if name in options}
    trainer = DistillationTrainer(
        tiny_model(hidden_size=12) if student is None else student,
        arguments(folder, train_sampling_strategy="sequential", **options),
        train_dataset=data(),
        data_collator=Padded(),
        processing_class=TOKENIZER,
        teacher=teacher,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def teachers(folder) -> dict:
    committee = STLMCommittee.from_members([tiny_model(), tiny_model(patching="fixed")])
    stored = StoredTeacher(store_teacher(folder / "teacher.bin", tiny_model(), data()))
    subwords = SubwordTeacher(llama(byte_level_bpe()), byte_level_bpe())
    return {"model": tiny_model(), "committee": committee, "stored": stored, "subwords": subwords}


def test_a_prompt_is_tuned_after_a_teacher(tmp_path):
    student = tiny_model()
    distributions = student(torch.tensor([RAGGED[0][:40]])).logits[0, :-1, :256].log_softmax(-1)
    model = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trainer = DistillationTrainer(model, arguments(tmp_path), teacher=tiny_model(), teacher_weight=1.0)
    ids = torch.tensor([RAGGED[0][:40]])
    loss = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": ids}).item()
    with torch.no_grad():
        tuned = model(ids).logits[0, 4:-1, :256].log_softmax(-1)
    expected = (distributions.exp() * (distributions - tuned)).sum(-1).mean().item()
    assert loss == pytest.approx(expected, rel=1e-4) and expected > 0.01


@pytest.mark.parametrize("name", ["model", "committee", "stored", "subwords"])
def test_the_loss_is_the_mixture_whatever_the_batch(tmp_path, name):
    teacher, student = teachers(tmp_path)[name], tiny_model(hidden_size=12)
    rows = data()[:4]
    hard = soft = count = 0
    with torch.no_grad():
        for row in rows:  # one by one
            ids = torch.tensor([row["input_ids"]])
            logits = student(ids).logits[0, :-1]
            hard += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            said = teacher_log_probs(teacher, {"input_ids": ids})[0, :-1]
            soft += divergence(said, logits).sum()
            count += len(logits)
    expected = (0.7 * hard + 0.3 * soft) / count
    assert 0.1 < soft / count != hard / count
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = distil(
            tmp_path / str(batch_size),
            teacher,
            teacher_weight=0.3,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        )
        assert losses(trainer)[0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_comes_to_predict_what_its_teacher_does(tmp_path):
    teacher = tiny_model()
    start = tiny_model(hidden_size=12)
    trainer = distil(tmp_path, teacher, start, teacher_weight=1.0, max_steps=60, num_train_epochs=1)
    inputs = Padded()(data())
    counted = (inputs.pop("labels")[:, 1:] >= 0) & (inputs["input_ids"][:, 1:] < 256)

    def distance(model):
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1][counted]
        return divergence(teacher_log_probs(teacher, inputs)[:, :-1][counted], logits).mean()

    assert distance(trainer.model.eval()) < 0.7 * distance(tiny_model(hidden_size=12))
    assert not any(parameter.grad is not None for parameter in teacher.parameters()) and not teacher.training
    # Checkpoints are those of the student.
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded) is STLMForCausalLM and loaded.num_parameters() == start.num_parameters()
    assert torch.equal(loaded(**inputs).logits, trainer.model(**inputs).logits)


def test_without_weight_it_is_the_plain_trainer_and_so_is_evaluation(tmp_path):
    ours = distil(tmp_path / "ours", tiny_model(), teacher_weight=0.0)
    options = {"train_dataset": data(), "data_collator": Padded(), "processing_class": TOKENIZER}
    plain = Trainer(
        tiny_model(hidden_size=12), arguments(tmp_path / "plain", train_sampling_strategy="sequential"), **options
    )
    plain.train()
    assert losses(ours) == losses(plain)
    for name, value in weights(ours.model).items():
        torch.testing.assert_close(value, weights(plain.model)[name], atol=1e-6, rtol=0)
    ours.teacher_weight = 0.5
    assert ours.evaluate(data())["eval_loss"] == pytest.approx(plain.evaluate(data())["eval_loss"], rel=1e-5)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "temperature": 2.0}
    whole = distil(tmp_path / "whole", tiny_model(), **options)
    distil(tmp_path / "cut", tiny_model(), max_steps=3, **options)
    resumed = distil(tmp_path / "cut", tiny_model(), resume=True, **options)
    for name, value in weights(resumed.model).items():
        assert torch.equal(value, weights(whole.model)[name]), name


def test_teachers_and_settings_that_make_no_sense_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    student = tiny_model(hidden_size=12)
    for teacher, message in (
        (llama(byte_level_bpe()), "vocabulary of the student, 320 ids, got a LlamaForCausalLM with .*SubwordTeacher"),
        (randomize(STLMForMaskedLM(tiny_config(is_causal=False))), "expected a causal teacher"),
        ("model", "gives next-byte probabilities, got a str"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationTrainer(student, args, teacher=teacher)
    for settings in ({"teacher_weight": 1.5}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="expected teacher_weight between 0 and 1 and temperature above 0"):
            DistillationTrainer(student, args, teacher=tiny_model(), **settings)
    stored = StoredTeacher(store_teacher(tmp_path / "teacher.bin", tiny_model(), data()))
    with pytest.raises(ValueError, match=r"temperature=2.0 needs all 256 probabilities"):
        DistillationTrainer(student, args, teacher=stored, temperature=2.0)


def test_packed_windows_of_a_corpus_are_distilled(tmp_path):
    path = write_corpus(tmp_path / "corpus.bin", [TEXT, "one", TEXT[:50]], TOKENIZER)
    windows = PackedWindows(path, TOKENIZER, block_size=64)
    teacher = SubwordTeacher(llama(byte_level_bpe()), byte_level_bpe())
    found = []
    for number in range(2):  # as it is and, without the rest, stored: the first steps of both are nearly the same
        args = arguments(tmp_path / str(number), max_steps=3, bf16=True)
        trainer = DistillationTrainer(
            tiny_model(), args, train_dataset=windows, processing_class=TOKENIZER, teacher=teacher
        )
        trainer.train()
        found.append(losses(trainer))
        assert all(math.isfinite(loss) for loss in found[-1])
        teacher = StoredTeacher(store_teacher(tmp_path / "teacher.bin", teacher, windows)) if number == 0 else None
    # Lumping bytes together makes the divergence smaller.
    assert 0.8 * found[0][0] < found[1][0] < found[0][0]


TWO_PROCESSES = """
import json, sys, torch
from transformers import TrainingArguments
from modeling_stlm import STLMForCausalLM
from modeling_stlm.training.distillation import DistillationTrainer
settings = json.loads(sys.argv[1])
model, teacher = (STLMForCausalLM.from_pretrained(settings[name]) for name in ("model", "teacher"))
rows = [list(b"a word and another w"), list(b"x" * 20), list(b"1 2 3 4 5 6 7 8 9 0 "), list(b"y" * 20)]
data = [{"input_ids": torch.tensor(row), "labels": torch.tensor([-100] * 3 * (i % 2) + row[3 * (i % 2):])}
        for i, row in enumerate(rows * 3)]
args = TrainingArguments(settings["out"], max_steps=3, learning_rate=0.1, optim="sgd", logging_steps=1,
                         per_device_train_batch_size=settings["rows"], save_strategy="no", report_to="none",
                         use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential")
trainer = DistillationTrainer(model, args, train_dataset=data, teacher=teacher)
trainer.train()
if trainer.is_world_process_zero():
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    total = [float(p.detach().double().abs().sum()) for p in model.parameters()]
    json.dump({"losses": losses, "weights": total, "processes": args.world_size}, open(settings["out"] + ".json", "w"))
"""


@pytest.mark.slow
def test_two_processes_distil_like_one(tmp_path):
    tiny_model(hidden_size=12).save_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "teacher")
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    found = []
    for processes in (1, 2):
        settings = {name: str(tmp_path / name) for name in ("model", "teacher")}
        out = str(tmp_path / str(processes))
        run(tmp_path / "train.py", processes, settings | {"out": out, "rows": 4 // processes})
        found.append(json.loads((tmp_path / f"{processes}.json").read_text()))
    assert [result["processes"] for result in found] == [1, 2]
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-4)
    assert found[0]["losses"][-1] < found[0]["losses"][0]
    assert found[0]["weights"] == pytest.approx(found[1]["weights"], rel=1e-5)


@pytest.mark.parametrize("kind", ["subwords", "committee"])
def test_the_example_compares_with_plain_training(tmp_path, small_text, kind):
    if kind == "subwords":
        tokenizer = byte_level_bpe()
        llama(tokenizer).save_pretrained(tmp_path / "teacher")
        tokenizer.save_pretrained(tmp_path / "teacher")
        names = ["teacher"]
    else:
        names = ["first", "second"]
        for seed, name in enumerate(names):
            tiny_model(max_patch_bytes=8 + seed).save_pretrained(tmp_path / name)
            TOKENIZER.save_pretrained(tmp_path / name)
    sizes = ("--windows", 4, "--block_bytes", 64, "--max_steps", 3, "--batch_size", 2, "--output", "out")
    output = run_example("distill.py", "--text", small_text, "--teacher", *names, *sizes, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("plain", "distilled"):
        assert f"{name}: {results[name]['bits_per_byte']:.4f} bits per byte" in output
        assert 2 < results[name]["bits_per_byte"] < 9
    assert results["plain"]["bits_per_byte"] != results["distilled"]["bits_per_byte"]
    assert ("teacher_seconds" in results) == (tmp_path / "out" / "teacher.bin").is_file() == (kind == "subwords")
    assert str(tmp_path) not in json.dumps(results)
    card = build_model_card(tmp_path / "out")  # as push_to_hub.py writes it
    assert f"- distilled from `{' '.join(names)}`, weight 0.5 of the loss" in card.text
    assert "384 bytes seen in 3 steps of 2 windows of 64 bytes" in card.text
    assert [e.metric_value for e in card.data.eval_results] == [round(results["distilled"]["bits_per_byte"], 4)]
    assert metadata_errors(str(card)) == []
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is STLMForCausalLM
    if kind == "subwords":
        # The stored outputs are of that teacher and of these windows.
        shutil.copytree(tmp_path / "teacher", tmp_path / "elsewhere" / "teacher")
        command = ["distill.py", "--text", small_text, *sizes, "--teacher", "teacher"]
        others = {"teacher": "elsewhere/teacher", "windows": 3, "block_bytes": 32}
        assert "teacher.begun.json was made with" in told_by(*command, cwd=tmp_path, **others)
        told = told_by(*command, "elsewhere/teacher", cwd=tmp_path)
        assert told == "--teacher teacher elsewhere/teacher: expected one model of subwords, or models of bytes alone"


def test_a_student_that_is_no_preset_is_noticed_before_the_teacher_reads(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "distill.py"), "--student", "stlm-4m"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr and list(tmp_path.iterdir()) == []
    assert "--student: " in result.stderr and "stlm-10m" in result.stderr


def test_the_question_of_distillation_is_asked_at_equal_time(tmp_path):
    (tmp_path / "text.txt").write_text("Zoë saw 東京. " + TEXT * 12)
    tiny_model().save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    options = ["--train", "text.txt", "--validation", "text.txt", "--teacher", "teacher", "--output", "out"]
    options += ["--windows", 3, "--validation_windows", 2, "--block_bytes", 64, "--minutes", 0.005, "--seeds", 1, 2]
    printed = run_example("research/distillation.py", *options, cwd=tmp_path)
    results = json.loads((tmp_path / "out" / "teacher.json").read_text())
    students = results["students"]
    assert [(s["student"], s["seed"]) for s in students] == [
        (kind, seed) for kind in ("distilled", "same", "fresh", "fresh") for seed in (1, 2)
    ]
    assert [s["minutes"] for s in students] == [0.005] * 6 + [0.01] * 2
    assert all(s["steps"] >= 1 and 2 < s["bits_per_byte"] < 9 for s in students)
    assert len({s["bits_per_byte"] for s in students}) == 8
    assert results["bytes"] == 3 * 64 and results["teacher_minutes"] >= 0 and 2 < results["teacher_bits_per_byte"] < 20
    means = [sum(s["bits_per_byte"] for s in students[i : i + 2]) / 2 for i in range(0, 8, 2)]
    for kind, mean in zip(("distilled", "same", "fresh", "fresh"), means):
        assert re.search(
            rf"^\| {kind} \|.*\| {mean:.4f} ± .*\| {re.escape(f'{mean - means[0]:+.4f}')} ± ", printed, re.MULTILINE
        )
    again = run_example("research/distillation.py", *options, cwd=tmp_path)
    assert again.splitlines()[-6:] == printed.splitlines()[-6:] and '"seed"' not in again
    assert len(StoredTeacher(tmp_path / "out" / "teacher.bin").index) == 3 and str(tmp_path) not in json.dumps(results)
    # Nothing that other texts, windows, teachers or settings made is taken for these.
    (tmp_path / "other.txt").write_text(TEXT * 12)
    command = [sys.executable, str(ROOT / "examples" / "research" / "distillation.py"), *map(str, options)]

    def refused(*words) -> str:
        result = subprocess.run([*command, *words], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        return result.stderr

    assert "train.json was made with" in refused("--train", "other.txt")
    for words in (
        ["--windows", "4"],
        ["--teacher", "elsewhere", "--name", "teacher"],
        ["--block_bytes", "32"],
        ["--no-bf16" if results["arguments"]["bf16"] == "True" else "--bf16"],
    ):
        assert "begun.json was made with" in refused(*words)
    (tmp_path / "out" / "begun.json").unlink()
    assert "does not say what it was made with" in refused()
