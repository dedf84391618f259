"""Muon and AdamW agree with torch's own, and a run resumes from the optimizer's state."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from predictor.training.optimizer import Muon, orthogonal

SHAPES = ((6, 10), (10, 6), (6, 10), (9, 4), (5,))
"""Three matrices for Muon, a table and a vector for AdamW."""


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def ours(params: list[nn.Parameter]) -> Muon:
    return Muon(params[:3], params[3:], lr=0.01, weight_decay=0.1)


def run(params: list[nn.Parameter], *optimizers: torch.optim.Optimizer, steps: int = 4) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        for optimizer in optimizers:
            optimizer.step()


def test_it_steps_as_torchs_muon_and_adamw_do() -> None:
    params, theirs = parameters(), parameters()
    run(params, ours(params))
    lr, betas = 0.01, (0.9, 0.98)
    run(
        theirs,
        torch.optim.Muon(theirs[:3], lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:4], weight_decay=0.1, lr=lr, betas=betas),
        torch.optim.AdamW(theirs[4:], weight_decay=0.0, lr=lr, betas=betas),
    )
    for p, q in zip(params[:3], theirs[:3], strict=True):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # theirs iterates in bfloat16
    for p, q in zip(params[3:], theirs[3:], strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_orthogonalised_matrices_keep_their_singular_vectors_and_lose_their_scale() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 12) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    made = orthogonal(matrices)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    aligned = u.mT @ made @ v.mT
    assert (aligned - torch.diag_embed(aligned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_a_stack_of_matrices_steps_as_each_of_them_alone() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 6, 10))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    stack.grad = torch.randn(3, 6, 10)
    for p, grad in zip(alone, stack.grad, strict=True):
        p.grad = grad.clone()
    Muon([stack], [], lr=0.01, weight_decay=0.1).step()
    Muon(alone, [], lr=0.01, weight_decay=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in alone]))


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    ours(params).step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


def test_a_restored_state_goes_on_as_if_never_stopped() -> None:
    params, copies = parameters(), parameters()
    first = ours(params)
    run(params, first, steps=2)
    state = deepcopy(first.state_dict())
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p.data)
    second = ours(copies)
    second.load_state_dict(state)
    run(params, first, steps=3)
    run(copies, second, steps=3)
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
