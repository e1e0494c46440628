# SPDX-License-Identifier: Apache-2.0
"""What is special about `patching="learned"`: smoothing, gradients, the ratio loss and its curriculum."""

import pytest
import torch
from transformers import Trainer

from modeling_stlm import STLMForCausalLM, STLMForMaskedLM
from modeling_stlm.batching_stlm import STLMBatch
from modeling_stlm.patching_stlm import PatchEnds
from modeling_stlm.training.patch_curriculum import PatchLengthCurriculum
from modeling_stlm.trunk_stlm import smooth_patches

from .tiny import TEXT, ids_of, randomize, tiny_config, tiny_model
from .trainers import arguments


IDS = torch.tensor([ids_of(TEXT)])


@pytest.mark.parametrize("num_patches", [1, 2, 7, 16])
def test_smoothing_is_a_loop(num_patches):
    patches, share, before = torch.randn(2, num_patches, 3), torch.rand(2, num_patches), torch.randn(2, 3)
    share[0, num_patches // 2] = 1  # forgets
    last, expected = before, []
    for p in range(num_patches):
        last = share[:, p, None] * patches[:, p] + (1 - share[:, p, None]) * last
        expected.append(last)
    torch.testing.assert_close(smooth_patches(patches, share, before), torch.stack(expected, 1))


def test_a_share_of_one_lets_nothing_through():
    patches, share = torch.randn(1, 5, 3), torch.full((1, 5), 0.5)
    share[0, 3] = 1
    broken = patches.clone()
    broken[0, :3] = 1e30
    before = torch.zeros(1, 3)
    assert torch.equal(smooth_patches(patches, share, before)[:, 3:], smooth_patches(broken, share, before)[:, 3:])


def test_a_fresh_router_compares_bytes_as_they_are():
    model = STLMForCausalLM(tiny_config(patching="learned"))
    states = torch.randn(1, 6, 16)
    batch, state = STLMBatch(6, None, None, None, None), model.model.patcher.fresh_state(1, torch.device("cpu"))
    context = torch.cat([state.last_ids, torch.full((1, 6), 97)], 1)
    probability = model.model.patcher.rule.advance(states, context, batch, state).confidence[0]
    assert probability[0] == 0.5
    for t in range(1, 6):
        cosine = torch.cosine_similarity(states[0, t], states[0, t - 1], dim=0)
        torch.testing.assert_close(probability[t], (1 - cosine) / 2)


def test_gradients_reach_the_router_without_the_ratio_loss():
    model = tiny_model(patching="learned", ratio_loss_weight=0).train()
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.model.patcher.rule.parameters())


def test_the_forward_pass_is_the_same_with_and_without_gradients():
    model = tiny_model(patching="learned")
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [STLMForCausalLM, STLMForMaskedLM])
def test_the_loss_has_the_ratio_loss_in_training_only(kind):
    causal = kind is STLMForCausalLM
    plain, weighted = (
        randomize(kind(tiny_config(patching="learned", ratio_loss_weight=weight, is_causal=causal)))
        for weight in (0, 0.5)
    )
    assert torch.equal(plain(IDS, labels=IDS).loss, weighted(IDS, labels=IDS).loss)
    plain, weighted = plain.train(), weighted.train()
    ratio_loss = weighted.model(IDS).ratio_loss
    if causal:
        torch.testing.assert_close(weighted(IDS).ratio_loss, ratio_loss)
    torch.testing.assert_close(weighted(IDS, labels=IDS).loss - plain(IDS, labels=IDS).loss, 0.5 * ratio_loss)
    labels = IDS.clone()
    labels[:, ::3] = -100
    count = int((labels[:, 1:] if causal else labels).ne(-100).sum())
    half = weighted(IDS, labels=labels, num_items_in_batch=2 * count).loss
    torch.testing.assert_close(half, weighted(IDS, labels=labels).loss / 2)


@torch.no_grad()
def test_the_ratio_loss_is_that_of_the_paper():
    router = tiny_model(patching="learned", patch_bytes=4).model.patcher.rule
    probability = torch.tensor([[0.9, 0.2, 0.6, 0.1, 0.7, 0.3, 0.3, 0.3], [0.8, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]])
    boundary, lengths = probability >= 0.5, torch.tensor([8, 4])
    f, g = 4 / 12, (3.4 + 1.1) / 12  # padding counts for nothing
    expected = 4 / 3 * (3 * f * g + (1 - f) * (1 - g))
    batch = STLMBatch(8, lengths, None, None, None)
    found = PatchEnds(boundary & batch.is_valid, None, probability)
    assert router.ratio_loss(found, batch).item() == pytest.approx(expected, rel=1e-6)
    right = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    found = PatchEnds(right >= 0.5, None, right)
    assert router.ratio_loss(found, STLMBatch(4, None, None, None, None)).item() == pytest.approx(1.0)


@pytest.mark.parametrize("wanted", [2, 8])
def test_the_ratio_loss_brings_patches_to_their_length(wanted):
    model = tiny_model(patching="learned", patch_bytes=wanted, ratio_loss_weight=1, max_patch_bytes=64).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, 123, (8, 64), generator=generator)
    for _ in range(80):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    boundary = model.eval()(ids, output_boundaries=True).boundaries
    assert boundary.numel() / boundary.sum() == pytest.approx(wanted, rel=0.35)


def test_the_curriculum_lengthens_patches(tmp_path):
    seen = []

    class Spy(PatchLengthCurriculum):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            super().on_step_begin(args, state, control, model=model, **kwargs)
            seen.append(model.model.patcher.rule.patch_bytes)

    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)[:, :32].tolist()]
    for options in ({"patching": "learned", "patch_bytes": 6}, {}):
        trainer = Trainer(
            model=tiny_model(**options),
            args=arguments(tmp_path, max_steps=6),
            train_dataset=rows,
            callbacks=[Spy(steps=4)],
        )
        if options:
            trainer.train()
    assert seen == [2, 3, 4, 5, 6, 6]
    with pytest.raises(ValueError, match="patching='spacelike' has no router"):
        trainer.train()
    with pytest.raises(ValueError, match="first_bytes=1 more than 1"):
        PatchLengthCurriculum(5, first_bytes=1)


def test_a_batch_without_any_byte_has_finite_gradients():
    model = tiny_model(patching="learned").train()
    labels, mask = torch.full_like(IDS, -100), torch.zeros_like(IDS)
    model(IDS, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(5)).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_straight_through_gradient_raises_what_was_decided():
    patcher, seen = tiny_model(patching="learned").model.patcher, torch.randn(1, 4, 16)
    confidence = torch.tensor([[0.9, 0.2, 0.6, 0.4]], requires_grad=True)
    out = patcher.straight_through(seen, PatchEnds(confidence.detach() >= 0.5, None, confidence))
    torch.testing.assert_close(out, seen)
    out.sum().backward()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(confidence.grad, sign * seen.sum(-1))
