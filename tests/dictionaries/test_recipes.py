"""The losses, against sums written out by hand and against finite differences; what revives dead features."""
import math

import numpy as np
import pytest
import torch

from bizzaroworld.dictionaries.recipes import (Recipe, _Jump, _Step, as_sae, features_while_training, first_parameters, ghost_loss, penalty, resample, within_the_ball,
                                               without_lengthening)
from bizzaroworld.dictionaries.saes import KINDS, DictionaryError

D, N, PLACE = 6, 16, ("resid_post", 1)


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def x(): return draw(40, D, seed=1)


def parameters(kind, **parts):
    "Parameters with nothing special about them, in double precision."
    made = first_parameters(Recipe(kind, n_features=N, k=3), draw(40, D))
    return {name: (part.detach().double() + 0.2 * draw(*part.shape, seed=i + 5)).requires_grad_() for i, (name, part) in enumerate(made.items())}


def squared(made, x, f): return (x - f @ made["W_dec"] - made["b_dec"]).pow(2).sum(1).mean()


def loss_of(recipe, made, x):
    f, pre = features_while_training(recipe, made, x)
    return squared(made, x, f) + penalty(recipe, made, x, f, pre)


def numpy_loss(recipe, made, x):
    "The same, token by token and feature by feature."
    p, total = {name: part.detach().numpy() for name, part in made.items()}, 0.0
    lengths = np.sqrt((p["W_dec"] ** 2).sum(1))
    pres = np.stack([(token - p["b_dec"]) @ p["W_enc"] + p["b_enc"] for token in x.numpy()])
    cut = np.sort(np.maximum(pres, 0).ravel())[-recipe.k * len(x)]
    for token, pre in zip(x.numpy(), pres):
        on = {"relu": pre > 0, "gated": pre > 0, "topk": (pre > 0) & (pre >= np.sort(pre)[-recipe.k]), "batchtopk": (pre > 0) & (pre >= cut), "jumprelu": pre > np.exp(p.get("log_threshold", 0))}[recipe.kind]
        value = (pre - p["b_enc"]) * np.exp(p["r_mag"]) + p["b_mag"] if recipe.kind == "gated" else pre
        f = np.where(on, np.maximum(value, 0), 0)
        out = p["b_dec"] + sum(f[i] * p["W_dec"][i] for i in range(N))
        total += ((token - out) ** 2).sum()
        if recipe.kind == "relu": total += recipe.sparsity * sum(f[i] * lengths[i] for i in range(N))
        if recipe.kind == "jumprelu": total += recipe.sparsity * on.sum()
        if recipe.kind == "gated":
            gate = np.maximum(pre, 0)
            total += recipe.sparsity * (gate * lengths).sum() + ((token - p["b_dec"] - gate @ p["W_dec"]) ** 2).sum()
    return total / len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_is_its_sum(kind, x):
    recipe, made = Recipe(kind, n_features=N, k=3, sparsity=0.7), parameters(kind)
    assert loss_of(recipe, made, x).item() == pytest.approx(numpy_loss(recipe, made, x), rel=1e-9)


# What a gradient is not to reach, or reaches through a kernel: the copy of the decoder that a gate reconstructs through, and thresholds.
STOPPED = {"gated": ("W_dec", "b_dec"), "jumprelu": ("log_threshold",)}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind, x):
    recipe, made = Recipe(kind, n_features=N, k=3, sparsity=0.7), parameters(kind)
    loss_of(recipe, made, x).backward()
    for name, part in made.items():
        if name in STOPPED.get(kind, ()): continue
        for at in (0, part.numel() // 2, part.numel() - 1):
            numbers = []
            for step in (1e-6, -1e-6):
                with torch.no_grad(): part[np.unravel_index(at, part.shape)] += step
                numbers.append(loss_of(recipe, made, x).item())
                with torch.no_grad(): part[np.unravel_index(at, part.shape)] -= step
            assert part.grad.reshape(-1)[at].item() == pytest.approx((numbers[0] - numbers[1]) / 2e-6, rel=1e-4, abs=1e-6), name


def test_a_gates_own_reconstruction_does_not_teach_the_decoder(x):
    "What reaches the decoder is the gradient of the squared error and of the penalty's norms alone."
    recipe, made = Recipe("gated", n_features=N, sparsity=0.7), parameters("gated")
    loss_of(recipe, made, x).backward()
    learned = {name: made[name].grad.clone() for name in ("W_dec", "b_dec")}
    f, pre = features_while_training(recipe, made, x)
    alone = squared(made, x, f) + 0.7 * (pre.relu() * made["W_dec"].norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(learned["W_dec"], torch.autograd.grad(alone, made["W_dec"], retain_graph=True)[0])
    # b_dec is read, too, as the bias before the encoder: there the gate's reconstruction teaches it
    through = alone + (x - pre.relu() @ made["W_dec"].detach() - made["b_dec"].detach()).pow(2).sum(1).mean()
    torch.testing.assert_close(learned["b_dec"], torch.autograd.grad(through, made["b_dec"])[0])


def test_the_kernel_is_the_smoothed_derivative():
    "The derivative of the expected number above the threshold is minus the density there; the kernel's estimate of it agrees on many draws."
    pre, threshold = draw(400_000, 1).abs(), torch.full((1,), 0.8, dtype=torch.float64, requires_grad=True)
    density = 2 * math.exp(-0.32) / math.sqrt(2 * math.pi)
    _Step.apply(pre, threshold, 0.05).mean().backward()
    assert threshold.grad.item() == pytest.approx(-density, rel=0.02)
    threshold.grad = None
    _Jump.apply(pre, threshold, 0.05).mean().backward()
    assert threshold.grad.item() == pytest.approx(-0.8 * density, rel=0.02)  # what is lost at the threshold is as large as the threshold


def test_the_kernels_gradients_by_hand():
    pre = torch.tensor([[0.98], [1.03], [2.0], [0.2], [1.06]], requires_grad=True)
    threshold = torch.ones(1, requires_grad=True)
    weights = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    (_Step.apply(pre, threshold, 0.1) * weights).sum().backward()
    assert threshold.grad.item() == pytest.approx(-30) and pre.grad is None
    threshold.grad = None
    (_Jump.apply(pre, threshold, 0.1) * weights).sum().backward()
    assert threshold.grad.item() == pytest.approx(-30) and pre.grad.flatten().tolist() == [0, 2, 4, 0, 16]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_is_given_back(kind, x):
    "The dictionary reads unscaled activations as training read scaled ones; a `batchtopk` with the threshold of the batch."
    recipe, made = Recipe(kind, n_features=N, k=3), parameters(kind)
    f, pre = features_while_training(recipe, made, x)
    least = f[f > 0].min().item()
    sae = as_sae(recipe, made, PLACE, 4.0, least - 1e-9, heads=2, model="bizzaro")
    torch.testing.assert_close(sae.encode(4 * x), f.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(sae(4 * x), 4 * (f @ made["W_dec"] + made["b_dec"]).detach(), atol=1e-5, rtol=1e-6)
    assert sae.heads == 2 and sae.model == "bizzaro" and sae.reads == sae.writes == PLACE and not sae.W_dec.requires_grad and sae.W_dec.data_ptr() != made["W_dec"].data_ptr()


# --- ghost gradients -------------------------------------------------------------------------------------------------------------------------------

def ghost_by_hand(pre, W, residual, mse, dead, scaled):
    "Token by token."
    total, live = 0.0, np.flatnonzero(dead)
    for token, left in zip(pre, residual):
        out = sum((np.exp(token[i]) if token[i] < 0 else token[i] + 1) * W[i] for i in live)
        out = out * np.linalg.norm(left) / (2 * np.linalg.norm(out) + 1e-6)
        total += ((out - left) ** 2).sum()
    loss = total / len(pre)
    return (loss * mse / (loss + 1e-6) if scaled else loss) * dead.mean()


@pytest.mark.parametrize("scaled", [True, False])
def test_the_ghost_loss_is_its_sum(x, scaled):
    made, recipe = parameters("relu"), Recipe("relu", n_features=N, ghost_scaled=scaled)
    pre, residual, dead, mse = 2 * draw(40, N, seed=3), draw(40, D, seed=4), torch.arange(N) % 3 == 0, torch.tensor(2.0, dtype=torch.float64)
    found = ghost_loss(recipe, made, pre, residual, mse, dead).item()
    assert found == pytest.approx(ghost_by_hand(pre.numpy(), made["W_dec"].detach().numpy(), residual.numpy(), 2.0, dead.numpy(), scaled), rel=1e-9)
    if scaled: assert found == pytest.approx(2.0 * 6 / 16, rel=1e-5)  # its size is the reconstruction's, times the share of the dead


def test_the_derivative_of_a_ghost_is_an_exponential_that_cannot_explode():
    "With one dead feature and one token the loss depends on the ghost through its product with the scale; that is constant, so the derivative shows up through the activation alone."
    recipe, W = Recipe("relu", n_features=1, ghost_scaled=False), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    residual, dead, mse = torch.tensor([[0.6, 0.8]], dtype=torch.float64), torch.ones(1, dtype=torch.bool), torch.tensor(1.0)
    for value in (-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 80.0):
        pre = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
        ghost_loss(recipe, {"W_dec": W}, pre, residual, mse, dead).backward()
        size = math.exp(value) if value < 0 else value + 1
        scale = 1 / (2 * size + 1e-6)
        assert pre.grad.item() == pytest.approx(2 * scale * (size * scale - 0.6) * math.exp(min(value, 0)), rel=1e-6)


def test_ghosts_reach_the_dead_alone(x):
    made, recipe = parameters("relu"), Recipe("relu", n_features=N)
    f, pre = features_while_training(recipe, made, x)
    dead = torch.arange(N) >= 12
    residual = x - f @ made["W_dec"] - made["b_dec"]
    ghost_loss(recipe, made, pre, residual, residual.pow(2).sum(1).mean(), dead).backward()
    assert (made["W_dec"].grad[~dead] == 0).all() and (made["W_enc"].grad[:, ~dead] == 0).all() and (made["b_enc"].grad[~dead] == 0).all()
    assert made["W_dec"].grad[dead].norm(dim=1).min() > 0 and made["W_enc"].grad[:, dead].norm(dim=0).min() > 0
    assert ghost_loss(recipe, made, pre, residual, residual.sum(), torch.zeros(N, dtype=torch.bool)).item() == 0


def test_a_step_along_the_ghosts_gradient_explains_more(x):
    "What the dead learn is what the others leave over: with their directions moved along the gradient, the ghost explains more of the residual."
    made, recipe = parameters("relu"), Recipe("relu", n_features=N, ghost_scaled=False)
    pre, residual, dead = draw(40, N, seed=3), draw(40, D, seed=4) + 1, torch.arange(N) < 4
    before = ghost_loss(recipe, made, pre, residual, torch.tensor(1.0), dead)
    before.backward()
    with torch.no_grad(): made["W_dec"] -= 0.1 * made["W_dec"].grad
    assert ghost_loss(recipe, made, pre, residual, torch.tensor(1.0), dead) < before


# --- resampling ------------------------------------------------------------------------------------------------------------------------------------

def test_resampling_puts_the_dead_where_tokens_are_reconstructed_badly(x):
    made, dead, recipe = parameters("gated"), torch.arange(N) >= 13, Recipe("gated", n_features=N)
    before, residual = {name: part.detach().clone() for name, part in made.items()}, torch.zeros(40, D, dtype=torch.float64)
    residual[[3, 17, 29]] = 1.0
    resample(recipe, made, x, residual, dead, torch.Generator().manual_seed(0))
    new = x[[3, 17, 29]] - before["b_dec"]
    new = new / new.norm(dim=1, keepdim=True)
    cosines = made["W_dec"][dead].detach() @ new.T
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2] and torch.allclose(cosines.max(1).values, torch.ones(3, dtype=torch.float64))  # each token once
    torch.testing.assert_close(made["W_enc"][:, dead].norm(dim=0), 0.2 * before["W_enc"][:, ~dead].norm(dim=0).mean().expand(3))
    torch.testing.assert_close(made["W_enc"][:, dead].T / made["W_enc"][:, dead].norm(dim=0)[:, None], made["W_dec"][dead])
    assert (made["b_enc"][dead] == 0).all() and (made["r_mag"][dead] == 0).all() and (made["b_mag"][dead] == 0).all()
    for name in made:
        kept = (made[name][:, ~dead], before[name][:, ~dead]) if name == "W_enc" else (made[name], before[name]) if name == "b_dec" else (made[name][~dead], before[name][~dead])
        assert torch.equal(*kept)


def test_tokens_are_drawn_by_the_square_of_their_loss(x):
    "Of two tokens, one whose loss is twice the other's is drawn four times as often."
    residual, drawn = torch.zeros(40, D, dtype=torch.float64), []
    residual[5, 0], residual[6, 0] = 1.0, math.sqrt(2)
    for seed in range(500):
        made = parameters("relu")
        resample(Recipe("relu", n_features=N), made, x, residual, torch.arange(N) == 0, torch.Generator().manual_seed(seed))
        near = (x[[5, 6]] - made["b_dec"]) @ made["W_dec"][0]
        drawn.append(near.argmax().item() if near.max() > 0 else -1)
    share = np.mean(np.array(drawn) == 1)
    assert 0.74 < share < 0.86 and set(drawn) == {0, 1}


def test_nothing_is_resampled_where_nothing_is_dead_or_lost(x):
    made = parameters("relu")
    before = {name: part.detach().clone() for name, part in made.items()}
    for residual, dead in ((torch.ones(40, D), torch.zeros(N, dtype=torch.bool)), (torch.zeros(40, D), torch.ones(N, dtype=torch.bool))):
        resample(Recipe("relu", n_features=N), made, x, residual, dead, torch.Generator())
        assert all(torch.equal(made[name], before[name]) for name in made)


# --- norms -----------------------------------------------------------------------------------------------------------------------------------------

def test_what_only_lengthens_a_direction_is_taken_off_its_gradient(x):
    recipe, made = Recipe("relu", n_features=N, sparsity=0.5), parameters("relu")
    loss_of(recipe, made, x).backward()
    grad, unit = made["W_dec"].grad.clone(), made["W_dec"].detach() / made["W_dec"].detach().norm(dim=1, keepdim=True)
    along = (grad * unit).sum(1, keepdim=True)
    assert along.abs().max() > 0.01
    without_lengthening(made)
    torch.testing.assert_close(made["W_dec"].grad, grad - along * unit)
    assert (made["W_dec"].grad * unit).sum(1).abs().max() < 1e-12


def test_the_ball_shortens_and_never_lengthens():
    made = {"W_dec": torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
    within_the_ball(made)
    torch.testing.assert_close(made["W_dec"], torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_the_start(x):
    made = first_parameters(Recipe("jumprelu", n_features=N, bandwidth=0.25), x.float())
    torch.testing.assert_close(made["W_dec"].norm(dim=1), torch.ones(N))
    assert torch.equal(made["W_enc"], made["W_dec"].T) and torch.equal(made["b_dec"], x.float().mean(0)) and made["log_threshold"].exp().allclose(torch.tensor(0.25)) and all(part.requires_grad for part in made.values())
    assert made["W_enc"].data_ptr() != made["W_dec"].data_ptr()


def test_the_rate_rises_and_falls():
    recipe = Recipe(n_features=64, steps=100, warmup=10, lr=2.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9:81] == [2.0] * 72 and rates[90] == pytest.approx(1.0) and 0 < rates[99] < rates[98]


@pytest.mark.parametrize("change, match", [({"kind": "vq"}, "Unknown kind"), ({"revive": "pray"}, "none, resample, ghost"), ({"k": 0}, "k is 0"), ({"steps": 0}, "steps is 0"), ({"n_features": 16, "k": 17}, "k is 17, of 16"),
                                           ({"lr": 0}, "lr is 0"), ({"bandwidth": -1}, "bandwidth is -1"), ({"sparsity": -1}, "sparsity is -1"), ({"warmup": -1}, "warmup is -1"), ({"ghost_all": -1}, "ghost_all -1"), ({"lr": float("nan")}, "lr is nan")])
def test_what_nothing_can_be_trained_with_is_refused(change, match):
    with pytest.raises(DictionaryError, match=match): Recipe(**change)
