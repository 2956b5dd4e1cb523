# SPDX-License-Identifier: GPL-3.0-or-later
"""The models in training compared with ComfyUI's own classes, and the training itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.sample
import pytest
import torch
from torch import Tensor, nn

from training import demo_architecture, host_models, schedules, text, train
from training.mmdit import MMDiT

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _the_hosts_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore ComfyUI's attention after the test, because training replaces it."""
    module = comfy.ldm.modules.attention
    monkeypatch.setattr(module, "optimized_attention", module.optimized_attention)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Use an untrained text encoder in place of the distilled one."""
    torch.manual_seed(5)
    made = text.new_encoder().eval().requires_grad_(False)
    monkeypatch.setattr(text, "load", lambda: made)
    return made


def _filled(name: schedules.Name) -> nn.Module:
    """Return a model with random weights everywhere, also where training starts at zero."""
    torch.manual_seed(1)
    model = train.build(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model.requires_grad_(False)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("name", schedules.NAMES)
def test_comfyui_samples_the_same_picture_as_the_plain_loop(name: schedules.Name, cfg: float, encoder: Any) -> None:
    model = _filled(name)
    context, empty = encoder.encode(["a red circle left of two blue squares"]), encoder.encode([""])
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    wanted = schedules.sample(name, model, context, empty, cfg, 4, noise)
    patcher = host_models.load_in_host(name, {f"{name}.{key}": value for key, value in model.state_dict().items()})
    pooled: dict[str, Any] = {"pooled_output": torch.zeros(1, demo_architecture.POOLED)} if name == "mmdit" else {}
    latent = torch.full((1, 3, 32, 32), -0.5)  # the host's pixels for 0 in the model's scale
    out: Tensor = comfy.sample.sample(
        *(patcher, noise, 4, cfg, "euler", "simple", [[context, pooled]], [[empty, pooled]], latent),
        disable_pbar=True,
        seed=0,
    )
    pictures = ((out + 1) / 2).clamp(0, 1)
    assert wanted.std() > 0.02 and wanted.min() < 0.5 < wanted.max()
    torch.testing.assert_close(pictures, wanted, atol=2e-4, rtol=0)


def test_the_transformer_equals_the_hosts_class() -> None:
    model = _filled("mmdit")
    host = host_models.load_in_host("mmdit", {f"mmdit.{key}": value for key, value in model.state_dict().items()})
    x, context = torch.randn(2, 3, 32, 32), torch.randn(2, 77, text.WIDTH)
    levels = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        theirs = host.model.diffusion_model(x, levels, context, transformer_options={})
    torch.testing.assert_close(model(x, levels, context), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_training_lowers_the_loss_through_every_weight(name: schedules.Name) -> None:
    torch.manual_seed(0)
    model = train.build(name)
    x, context = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32), torch.randn(2, 77, text.WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    noised, t, target = schedules.training_pair(name, x, torch.Generator().manual_seed(0))
    for _ in range(12):
        loss = nn.functional.mse_loss(model(noised, t, context=context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    unused = [key for key, p in model.named_parameters() if p.grad is None]
    assert unused == []


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, encoder: Any) -> None:
    settings = {"seed": 0, "minutes": 100.0, "steps": 4, "batch": 2, "lr": 1e-3}
    runs = []
    for name, stops in (("once", (4,)), ("halves", (2, 4))):
        folder = tmp_path / name
        folder.mkdir()
        for stop in stops:
            training = train.Training("mmdit", folder, settings)
            while training.step < stop:
                training.advance()
            training.save()
        runs.append(training)
    for key, value in runs[0].average.items():
        assert torch.equal(value, runs[1].average[key]), key
    with pytest.raises(SystemExit, match=r"started with --lr 0.001, not 0.002: .*another --out"):
        train.Training("mmdit", tmp_path / "once", {**settings, "lr": 2e-3})


def test_the_transformer_reads_short_contexts_first_and_whole_ones_at_the_end(tmp_path: Path, encoder: Any) -> None:
    settings = {"seed": 0, "minutes": 100.0, "steps": 10, "batch": 2, "lr": 1e-3}
    all_lengths: dict[schedules.Name, dict[int, int]] = {"mmdit": {0: 32, 8: 32, 9: 77}, "unet": {0: 77, 9: 77}}
    for name, lengths in all_lengths.items():
        training = train.Training(name, tmp_path, settings)
        for training.step, length in lengths.items():
            assert training.examples()[2].shape == (2, length, 96)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_every_weight_is_trained_by_one_optimizer_and_the_inner_ones_by_muon(name: schedules.Name) -> None:
    model = train.build(name)
    # Muon gets other tensors on the same memory.
    named = {p.data_ptr(): key for key, p in model.named_parameters()}
    adam, muon = (
        {named[p.data_ptr()] for group in one.param_groups for p in group["params"]}
        for one in train.optimizers(name, model, 1e-3)
    )
    assert not adam & muon and adam | muon == set(named.values())
    inner = {
        "mmdit": {"double_blocks.1.txt_attn.qkv.weight", "single_blocks.3.linear2.weight"},
        "unet": {
            "input_blocks.1.0.in_layers.2.weight",
            "middle_block.1.transformer_blocks.0.attn2.to_k.weight",
            "output_blocks.2.1.proj_out.weight",
        },
    }
    assert inner[name] < muon
    outer = (".lin.", "img_in.", "txt_in.", "time_in.", "final_layer", ".bias", "norm", "time_embed.", "emb_layers.")
    assert not any(part in key or key.startswith(("input_blocks.0.", "out.")) for key in muon for part in outer)


def test_muon_treats_a_convolution_as_a_matrix() -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrix = nn.Parameter(convolution.weight.detach().permute(0, 2, 3, 1).reshape(6, 36).clone())
    ours = train.MatrixMuon([convolution.weight], lr=0.1)
    plain = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    before = matrix.detach().clone()
    for _ in range(2):
        convolution.weight.grad = torch.randn(6, 4, 3, 3)  # in any format
        matrix.grad = convolution.weight.grad.permute(0, 2, 3, 1).reshape(6, 36)
        ours.step()
        plain.step()
    assert torch.equal(convolution.weight.permute(0, 2, 3, 1).reshape(6, 36), matrix)
    assert not torch.equal(matrix, before)
    with pytest.raises(ValueError, match="channels_last"):
        train.MatrixMuon([nn.Conv2d(4, 6, 3).weight], lr=0.1)


def test_a_step_in_bfloat16_is_nearly_the_same_and_keeps_full_precision_weights(tmp_path: Path) -> None:
    losses = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        folder.mkdir()
        settings = {"seed": 0, "minutes": 100.0, "steps": 4, "batch": 2, "lr": 0.2, "bf16": bf16}
        training = train.Training("unet", folder, settings)
        losses.append([training.advance() for _ in range(3)])
        assert {value.dtype for value in (*training.model.parameters(), *training.average.values())} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_training_pair_leads_back_to_the_picture() -> None:
    x = torch.randn(4, 3, 32, 32)
    noised, t, target = schedules.training_pair("mmdit", x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(noised - t[:, None, None, None] * target, x, atol=1e-5, rtol=1e-5)
    noised, t, target = schedules.training_pair("unet", x, torch.Generator().manual_seed(0))
    sigma = schedules.SIGMAS[t.long()].float()[:, None, None, None]
    amount = sigma / (1 + sigma**2).sqrt()
    torch.testing.assert_close((1 - amount**2).sqrt() * noised - amount * target, x, atol=1e-4, rtol=1e-4)


def test_the_transformer_reads_text_and_place() -> None:
    model = _filled("mmdit")
    assert isinstance(model, MMDiT)
    x, level = torch.randn(1, 3, 32, 32), torch.tensor([0.5])
    context = torch.randn(1, 77, text.WIDTH)
    out = model(x, level, context)
    assert not torch.allclose(out, model(x, level, context.flip(-1)))
    assert not torch.allclose(out.roll(4, -1), model(x.roll(4, -1), level, context), atol=1e-3)
