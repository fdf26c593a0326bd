"""Distances against torch's own, and by loops over examples and tokens."""

import pytest
import torch
from torch import nn

from qpipe.model import distances

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def per_token(distance, student, teacher):
    """Mean over real tokens of each example, then over examples, with a loop."""
    examples = []
    for row, mask in enumerate(MASK):
        tokens = [float(distance(student[row, i], teacher[row, i])) for i in range(4) if mask[i]]
        examples.append(sum(tokens) / len(tokens))
    return sum(examples) / len(examples)


def test_kl_is_that_of_torch():
    student, teacher = pair(5, 3)
    expected = nn.KLDivLoss(reduction="batchmean")((student / 3).log_softmax(-1), (teacher / 3).softmax(-1)) * 9
    torch.testing.assert_close(distances.logits_kl(student, teacher, 3.0), expected)


def test_soft_targets_have_the_factor_of_the_temperature_too():
    student, teacher = pair(5, 3)
    expected = nn.CrossEntropyLoss()(student / 3, (teacher / 3).softmax(-1)) * 9
    torch.testing.assert_close(distances.logits_kl(student, teacher, 3.0, entropy=True), expected)


def test_kl_of_tokens_leaves_padding_out():
    student, teacher = pair(2, 4, 3)

    def kl(s, t):
        p, q = t.softmax(-1), s.softmax(-1)
        return (p * (p / q).log()).sum()

    assert distances.logits_kl(student, teacher, 1.0, MASK).item() == pytest.approx(per_token(kl, student, teacher))


def test_a_mask_of_tokens_is_no_mask_of_examples():
    student, teacher = pair(2, 4)
    assert torch.equal(distances.logits_kl(student, teacher, 2.0, MASK), distances.logits_kl(student, teacher, 2.0))
    torch.testing.assert_close(distances.logits_mse(student, teacher, MASK), nn.MSELoss()(student, teacher))


def test_cosine_is_that_of_torch():
    student, teacher = pair(2, 4, 8)
    embedding = nn.CosineEmbeddingLoss()

    def one(s, t):
        return embedding(s[None], t[None], torch.ones(1))

    found = distances.hidden_cosine(student, teacher, MASK).item()
    assert found == pytest.approx(per_token(one, student, teacher), rel=1e-5)
    assert distances.hidden_cosine(3 * teacher, teacher, MASK).item() == pytest.approx(0, abs=1e-6)


def test_hidden_mse():
    student, teacher = pair(2, 4, 8)
    found = distances.hidden_mse(student, teacher, MASK).item()
    assert found == pytest.approx(per_token(nn.MSELoss(), student, teacher), rel=1e-5)
    torch.testing.assert_close(distances.hidden_mse(student, teacher, None), nn.MSELoss()(student, teacher))


def seen_pairs(mask, causal, tokens):
    """The signal `visible`: real keys, and no later ones."""
    seen = mask[:, None, None, :].bool().expand(-1, 1, tokens, -1)
    return seen & torch.ones(tokens, tokens, dtype=torch.bool).tril() if causal else seen


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_pairs_of_real_tokens(causal):
    student, teacher = pair(2, 3, 4, 4)
    expected = []
    for row, mask in enumerate(MASK):
        seen = [(i, j) for i in range(4) for j in range(4) if mask[i] and mask[j] and not (causal and j > i)]
        squares = [(student[row, :, i, j] - teacher[row, :, i, j]).square().mean() for i, j in seen]
        expected.append(sum(squares) / len(squares))
    visible = seen_pairs(MASK, causal, 4)
    torch.testing.assert_close(distances.attention_mse(student, teacher, visible, MASK), sum(expected) / 2)


def test_attention_without_padding():
    student, teacher = pair(2, 3, 4, 4)
    torch.testing.assert_close(distances.attention_mse(student, teacher, None), nn.MSELoss()(student, teacher))
    unpadded = torch.ones(2, 4)
    torch.testing.assert_close(
        distances.attention_mse(student, teacher, None, unpadded), nn.MSELoss()(student, teacher)
    )


def test_sharing_out_a_batch_changes_nothing():
    """The mean over two halves of a batch, padded or not, is that over the whole."""
    student, teacher = pair(2, 4, 8)
    whole = distances.hidden_mse(student, teacher, MASK)
    halves = [distances.hidden_mse(student[i : i + 1], teacher[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    short = distances.hidden_mse(student[1:, :1], teacher[1:, :1], MASK[1:, :1])
    torch.testing.assert_close(sum(halves) / 2, whole)
    torch.testing.assert_close(halves[1], short)


def scores_by_autograd(student, teacher, visible, floor):
    """Mean squared difference of scores, written out."""
    ours, theirs = student, teacher
    if floor is not None:
        ours, theirs = torch.where(ours > floor, ours, 0.0), torch.where(theirs > floor, theirs, 0.0)
    difference = ours - theirs if visible is None else torch.where(visible, ours - theirs, 0.0)
    return (difference**2).sum() / student.numel()


@pytest.mark.parametrize("floor", [None, -1.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_all_scores_mse_and_its_gradient(masked, causal, floor):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 2, 5, 5, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    visible = seen_pairs(mask if masked else torch.ones(3, 5), causal, 5) if masked or causal else None
    student[0, 0, 0, 0] = -1.0  # at the floor itself
    found, expected = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = 3 * distances.all_scores_mse(found, teacher, visible, floor)
    theirs = 3 * scores_by_autograd(expected, teacher, visible, floor)
    torch.testing.assert_close(ours, theirs)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(found.grad, expected.grad)
