# SPDX-License-Identifier: GPL-3.0-or-later
"""The few-step student: its targets are the teacher's own states, in steps of Euler's method."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from training import distill, export, schedules, text, train

torch.set_num_threads(1)


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Export a transformer with random weights."""
    torch.manual_seed(5)
    encoder = text.new_encoder().eval().requires_grad_(False)
    monkeypatch.setattr(text, "load", lambda: encoder)
    model = train.build("mmdit")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    weights = {f"mmdit.{key}": value for key, value in model.state_dict().items()}
    weights |= {f"text.{key}": value for key, value in encoder.state_dict().items()}
    path = tmp_path / "teacher.safetensors"
    safetensors.torch.save_file(weights, path)
    return path


@pytest.mark.parametrize("name", schedules.NAMES)
def test_a_student_that_is_right_steps_from_state_to_state(name: schedules.Name) -> None:
    states = torch.randn(3, distill.STEPS + 1, 3, 32, 32)
    sigmas = schedules.levels(name, distill.STEPS).tolist()
    for step in range(distill.STEPS):
        noised, _, target = distill.pair(name, states, step)
        expected, _ = schedules.model_input(name, states[:, step], sigmas[step])
        assert torch.equal(noised, expected)
        x0 = schedules.denoised(name, lambda *_, out=target, **__: out, states[:, step], sigmas[step], torch.empty(0))
        end = x0 + (states[:, step] - x0) * (sigmas[step + 1] / sigmas[step])
        torch.testing.assert_close(end, states[:, step + 1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_the_students_noise_levels_are_among_the_teachers(name: schedules.Name) -> None:
    fine = schedules.levels(name, distill.STEPS * distill.TEACHER_STEPS)
    assert torch.equal(schedules.levels(name, distill.STEPS), fine[:: distill.TEACHER_STEPS])


def test_the_states_are_the_teachers(teacher: Path) -> None:
    teacher_states = distill.states_of(teacher, 3, 4.0, seed=1, batch=2)
    name, model, encoder = export.load(teacher)
    assert teacher_states["states"].shape == (3, distill.STEPS + 1, 3, 32, 32)
    again = distill.states_of(teacher, 2, 4.0, seed=1, batch=2)
    assert all(torch.equal(again[key], teacher_states[key][:2]) for key in again)
    noise = teacher_states["states"][:2, 0].float()
    states = schedules.path(name, model, encoder(teacher_states["ids"][:2]), encoder.encode([""]), 4.0, 16, noise)
    torch.testing.assert_close(teacher_states["states"][:2].float(), torch.stack(states[::4], 1), atol=0.05, rtol=0.01)


def test_a_student_starts_as_its_teacher_and_learns(teacher: Path, tmp_path: Path) -> None:
    teacher_states = distill.states_of(teacher, 4, 4.0, seed=1, batch=4)
    settings = {"seed": 0, "minutes": 100.0, "steps": 300, "batch": 4, "lr": 1e-3}
    student = distill.Distillation("mmdit", tmp_path, settings, teacher_states)
    _, model, _ = export.load(teacher)
    student.start_from(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in student.model.state_dict().items())
    losses = [student.advance() for _ in range(40)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    student.save()
    later = distill.Distillation("mmdit", tmp_path, settings, teacher_states)
    later.start_from(model.state_dict())
    assert later.step == 40 and not torch.equal(later.average["img_in.weight"], model.state_dict()["img_in.weight"])
