"""The monitor of gradients by term: its values, and no effect on training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coordexp.losses.terms import TERMS
from coordexp.training.step import TeacherTask, gradient_logs, monitored_parameters
from helpers import criterion_of, logs_of, new_checkpoint


def test_two_terms_by_hand():
    """Gradients (3, 4), text (1, 0): norm 5, cosine 0.6."""
    w = nn.Parameter(torch.tensor([0.5, 0.5]))
    unused = nn.Parameter(torch.ones(2))
    terms = {"text_ce": w[0] * 1.0, "softce": (w * torch.tensor([3.0, 4.0])).sum(), "w1": 0.0 * w.sum()}
    logs = gradient_logs(terms, [w, unused])
    assert logs == pytest.approx(
        {"grad/text_ce_norm": 1, "grad/softce_norm": 5, "grad/softce_cos_text": 0.6, "grad/w1_norm": 0}
    )
    assert w.grad is None


def test_without_a_text_loss_there_are_norms_alone():
    w = nn.Parameter(torch.tensor(2.0))
    assert gradient_logs({"gate": w**2}, [w]) == {"grad/gate_norm": pytest.approx(4.0)}


def test_the_monitor_selects_steps_and_trainable_parameters():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    assert [bool(monitored_parameters(model, 3, step)) for step in range(5)] == [True, False, False, True, False]
    assert not monitored_parameters(model, 0, 0)
    assert monitored_parameters(model, 1, 7) == [model.weight]


def test_every_term_is_measured_and_the_step_stays_as_it_is(world):
    """The terms' gradients add up to that of the loss; loss, gradient and random numbers are those without monitor."""
    gradients, rows, states = [], [], []
    for every in (0, 2):
        checkpoint = new_checkpoint()
        criterion = criterion_of(checkpoint)
        task = TeacherTask(
            checkpoint.model,
            criterion,
            world.source(checkpoint),
            world.collator(checkpoint),
            [[[0, 1], [2]]],
            grad_monitor_every=every,
        )
        torch.manual_seed(3)
        (micro,) = task.micro_batches(0)
        micro.loss.backward()
        states.append(torch.get_rng_state())
        gradients.append(torch.cat([p.grad.flatten() for p in checkpoint.model.parameters() if p.grad is not None]))
        rows.append(logs_of(micro))
    plain, monitored = rows
    assert torch.equal(*gradients)
    assert torch.equal(*states)
    assert {k: v for k, v in monitored.items() if not k.startswith("grad/")} == plain
    for name in TERMS:
        assert (f"grad/{name}_norm" in monitored) == (criterion.weights.get(name, 0) != 0)
    # By the cosines alone: <sum of gradients, text gradient> / |text gradient|.
    text = monitored["grad/text_ce_norm"]
    along_text = text + sum(
        monitored[f"grad/{n}_norm"] * monitored[f"grad/{n}_cos_text"] for n in criterion.weights.keys() - {"text_ce"}
    )
    assert math.isfinite(along_text)
    assert along_text <= gradients[0].norm().item() * (1 + 1e-4)
