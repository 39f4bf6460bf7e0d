"""Gradients of the KL estimators, by enumeration of all sequences of two tokens."""

import pytest
import torch

from rayhf.losses.kl import kl_loss, unbiased_kl_loss


def setting():
    """Return logits (first token, second token by first), and the reference's log-probs."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_first = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(-1)
    ref_second = torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    return first, second, ref_first, ref_second


def log_probs():
    """Return the parameters, and per sequence: probability, log-probs (9, 2), reference (9, 2)."""
    first, second, ref_first, ref_second = setting()
    p_first, p_second = first.log_softmax(-1), second.log_softmax(-1)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    logp = torch.stack([torch.stack((p_first[a], p_second[a, b])) for a, b in pairs])
    ref = torch.stack([torch.stack((ref_first[a], ref_second[a, b])) for a, b in pairs])
    return (first, second), logp.sum(1).exp(), logp, ref


def gradient(parameters, value):
    grads = torch.autograd.grad(value, parameters)
    return torch.cat([g.flatten() for g in grads])


def state_kl(direction):
    """Return the gradient of the KL of each state's next token, the states held fixed."""
    first, second, ref_first, ref_second = setting()
    p_first, p_second = first.log_softmax(-1), second.log_softmax(-1)

    def kl(p, ref):
        forward = (ref.exp() * (ref - p)).sum(-1)
        return forward if direction == "forward" else (p.exp() * (p - ref)).sum(-1)

    weights = p_first.detach().exp()
    value = kl(p_first, ref_first) + (weights * kl(p_second, ref_second)).sum()
    return gradient((first, second), value)


def sequence_kl():
    parameters, probability, logp, ref = log_probs()
    return gradient(parameters, (probability * (logp - ref).sum(1)).sum())


def test_k1_on_the_reward_to_go_has_the_gradient_of_the_sequence_kl():
    parameters, probability, logp, ref = log_probs()
    gap = (logp - ref).detach()
    to_go = gap.flip(1).cumsum(1).flip(1)
    surrogate = (probability.detach()[:, None] * to_go * logp).sum()
    assert gradient(parameters, surrogate).tolist() == pytest.approx(sequence_kl().tolist())


@pytest.mark.parametrize(("estimator", "direction"), [("k2", "reverse"), ("k3", "forward")])
def test_kl_in_the_loss_has_the_gradient_with_states_held_fixed(estimator, direction):
    parameters, probability, logp, ref = log_probs()
    loss = (probability.detach()[:, None] * kl_loss(logp, ref, estimator)).sum()
    ours = gradient(parameters, loss)
    assert ours.tolist() == pytest.approx(state_kl(direction).tolist())
    assert float((ours - sequence_kl()).norm() / sequence_kl().norm()) > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_ratio_makes_the_gradient_that_of_the_reverse_kl(estimator):
    """Samples of another policy than the one that is trained, as in later optimizer steps."""
    generator = torch.Generator().manual_seed(5)

    def log_probs(scale):
        return (scale * torch.randn(5, generator=generator, dtype=torch.float64)).log_softmax(-1)

    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    old, ref = log_probs(1.5), log_probs(1.5)

    def gradient_of(value):
        return gradient((logits,), value(logits.log_softmax(-1)).sum())

    true = gradient_of(lambda logp: logp.exp() * (logp - ref))
    ours = gradient_of(lambda logp: old.exp() * unbiased_kl_loss(logp, ref, old, estimator))
    assert ours.tolist() == pytest.approx(true.tolist(), rel=1e-9)
    if estimator != "k1":  # without the ratio it is another one
        plain = gradient_of(lambda logp: old.exp() * kl_loss(logp, ref, estimator))
        assert float((plain - true).norm() / true.norm()) > 0.1


def test_k2_and_k3_with_the_ratio_have_one_gradient_per_token():
    generator = torch.Generator().manual_seed(6)
    logp, ref, old = -torch.rand(3, 7, generator=generator, dtype=torch.float64)
    logp.requires_grad_()
    first, second = (
        gradient((logp,), unbiased_kl_loss(logp, ref, old, estimator).sum())
        for estimator in ("k2", "k3")
    )
    expected = (logp - old).exp() * (logp - ref)  # rho * g
    assert first.tolist() == pytest.approx(expected.tolist())
    assert second.tolist() == pytest.approx(expected.tolist())
