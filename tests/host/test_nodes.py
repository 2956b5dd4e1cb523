# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes as the host sees them: schemas, defaults, and errors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import comfy.sd
import comfy.utils
import pytest
import torch

import host_process as host

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PRESETS = host.pack_module("nodes.presets").PRESETS
DEFAULT = host.pack_module("nodes.presets").DEFAULT
NODE_IDS = [
    "GAGuidance",
    "GAGuidanceAdvanced",
    "GAGAnderson",
    "GAGProbe",
    "GAGReport",
    "GAGSchedule",
    "GAGSweep",
    "GAGGrid",
    "GAGScore",
    "GAGCheck",
    "GAGDemoLoader",
]
# What users may type into the search box, with the nodes that it must find. The host's search ignores case.
SEARCHED_BY_ALIAS = {
    "PLADIS": {"GAGuidance", "GAGuidanceAdvanced"},
    "NAG": {"GAGuidance"},
    "prompt adherence": {"GAGuidance", "GAGuidanceAdvanced"},
    "sparse attention": {"GAGuidance"},
    "heatmap": {"GAGProbe", "GAGReport"},
    "DAAM": {"GAGProbe", "GAGReport"},
    "contact sheet": {"GAGGrid"},
    "parameter sweep": {"GAGSweep"},
    "keyframes": {"GAGSchedule"},
    "benchmark": {"GAGCheck"},
    "test model": {"GAGDemoLoader"},
}
# The same on hosts without aliases.
SEARCHED_BY_NAME = {
    "gag": {"GAGuidance", "GAGuidanceAdvanced", "GAGSweep", "GAGCheck", "GAGDemoLoader"},
    "attention": {"GAGuidance", "GAGuidanceAdvanced", "GAGAnderson", "GAGProbe", "GAGReport"},
    "attention guidance": {"GAGuidance", "GAGuidanceAdvanced", "GAGAnderson"},
    "xy plot": {"GAGSweep"},
    "strength": {"GAGSchedule"},
    "labelled": {"GAGGrid"},
    "self-test": {"GAGCheck"},
    "tiny model": {"GAGDemoLoader"},
}


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_input_and_output_has_a_tooltip(node_id: str) -> None:
    schema = host.NODES[node_id].GET_SCHEMA()
    for item in (*schema.inputs, *schema.outputs):
        assert item.tooltip, item.id
        assert len(item.tooltip) > 10
    assert schema.description


def aliases_of(node_id: str) -> list[str]:
    """Return the aliases that a node gives to hosts that take them."""

    def schema(*, search_aliases: list[str], **fields: Any) -> Any:
        return SimpleNamespace(search_aliases=search_aliases, **fields)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.pack_module("nodes.gag").io, "Schema", schema)
        found: list[str] = host.NODES[node_id].define_schema().search_aliases
    return found


@pytest.mark.parametrize("words", SEARCHED_BY_NAME)
def test_a_search_finds_the_right_nodes_by_name(words: str) -> None:
    names = {node_id: host.NODES[node_id].GET_SCHEMA().display_name.lower() for node_id in NODE_IDS}
    assert {node_id for node_id, name in names.items() if words in name} >= SEARCHED_BY_NAME[words]


@pytest.mark.parametrize("words", SEARCHED_BY_ALIAS)
def test_a_search_finds_the_right_nodes_by_alias(words: str) -> None:
    found = {node_id for node_id in NODE_IDS if any(words.lower() in alias.lower() for alias in aliases_of(node_id))}
    assert found >= SEARCHED_BY_ALIAS[words]


def test_names_sort_together_and_differ() -> None:
    names = [host.NODES[node_id].GET_SCHEMA().display_name for node_id in NODE_IDS]
    assert all(name.startswith("GAG") and len(name) > len("GAG Sweep") for name in names)
    assert len(set(names)) == len(names)


def test_advanced_has_every_field_of_the_config_with_the_default_preset() -> None:
    """The fields of the rule "anderson" are left out, because it has its own node."""
    inputs = {i.id: i for i in host.NODES["GAGuidanceAdvanced"].GET_SCHEMA().inputs}
    for field in dataclasses.fields(GuidanceConfig):
        if field.name.startswith("anderson_"):
            continue
        assert inputs[field.name].default == getattr(DEFAULT.config, field.name)
    for name in ("start_percent", "end_percent", "adapt_to_cfg"):
        assert inputs[name].default == getattr(DEFAULT, name)


def test_any_cfg_is_the_default_preset() -> None:
    inputs = {i.id: i for i in host.NODES["GAGuidance"].GET_SCHEMA().inputs}
    assert list(inputs) == ["model", "preset", "strength", "schedule"]
    assert inputs["preset"].default == "auto"
    assert inputs["preset"].options == list(PRESETS)
    assert inputs["strength"].default == 1.0, "the preset as named"


def test_the_preset_paper_is_the_papers_settings() -> None:
    paper = {"guidance_scale": 10.0, "norm_threshold": 15.0, "norm_mode": "absolute", "orthogonal_scale": 0.0}
    whole_run = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "adapt_to_cfg": False}
    fields = PRESETS["paper"].fields
    assert fields == {**fields, **paper, **whole_run, "rule": "gag", "alpha": 1.5, "merge_heads": False}


def test_a_preset_has_every_setting_but_where_guidance_acts() -> None:
    inputs = {i.id for i in host.NODES["GAGuidanceAdvanced"].GET_SCHEMA().inputs}
    apart = {"model", "apply_to", "blocks", "verbose", "schedule"}
    anderson = {"anderson_depth", "anderson_regularization"}
    for preset in PRESETS.values():
        assert set(preset.fields) == (inputs - apart) | anderson


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_equals_its_settings_in_the_advanced_node(name: str) -> None:
    """Strength multiplies that of the preset. At this number of steps a later start leaves the first ones alone."""
    model = host.build_model("sd15")
    run: dict[str, Any] = {"steps": 4, "cfg": 1.5}
    pictures = [host.sample(model, "sd15", **run)]
    for strength in (1.0, 1.7):
        (simple,) = host.run_node("GAGuidance", model=model, preset=name, strength=strength)
        inputs = host.preset_inputs(name)
        inputs["strength"] = strength * PRESETS[name].config.strength
        (advanced,) = host.run_node("GAGuidanceAdvanced", model=model, **inputs)
        pictures.append(host.sample(simple, "sd15", **run))
        assert torch.equal(pictures[-1], host.sample(advanced, "sd15", **run))
    assert len({float(picture.double().sum()) for picture in pictures}) == 3


@pytest.mark.parametrize(
    ("strength", "error", "sentence"),
    [
        (float("nan"), ValueError, "strength must be a finite number, got nan."),
        (float("inf"), ValueError, "strength must be a finite number, got inf."),
        (True, TypeError, "strength must be a number, got True."),
        ("1", TypeError, "strength must be a number, got '1'."),
    ],
)
def test_a_bad_strength_is_refused_in_one_sentence(strength: Any, error: type[Exception], sentence: str) -> None:
    for name in PRESETS:
        with pytest.raises(error) as raised:
            host.run_node("GAGuidance", model=host.build_model("sd15"), preset=name, strength=strength)
        assert str(raised.value) == sentence


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "start after end": ({"start_percent": 0.8, "end_percent": 0.2}, ["0.8", "0.2", "start"]),
    "alpha": ({"alpha": 3.0}, ["alpha", "3.0", "from 1 to 2"]),
    "rule": ({"rule": "magic"}, ["rule", "'magic'", "'gag'"]),
    "apply_to": ({"apply_to": "negative"}, ["apply_to", "'negative'", "both"]),
    "blocks": ({"blocks": "d99"}, ["blocks", "'d99'", "d0-1"]),
    "adapt_to_cfg": ({"adapt_to_cfg": "on"}, ["adapt_to_cfg", "'on'", "True or False"]),
    "not a number": ({"guidance_scale": float("nan")}, ["guidance_scale", "finite"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_in_one_sentence_and_changes_nothing(case: str) -> None:
    inputs, words = WRONG[case]
    model = host.build_model("sd15")
    before = {key: dict(entry) for key, entry in model.wrappers.items()}
    with pytest.raises((ValueError, TypeError)) as raised:
        host.run_node("GAGuidanceAdvanced", model=model, **inputs)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "\n" not in str(raised.value)
    assert {key: dict(entry) for key, entry in model.wrappers.items()} == before


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of auto, .*, got 'wild'"):
        host.run_node("GAGuidance", model=host.build_model("sd15"), preset="wild")


@pytest.mark.parametrize("node_id", ["GAGuidance", "GAGuidanceAdvanced"])
def test_a_model_without_family_is_refused(node_id: str) -> None:
    """A class of a newer ComfyUI, that this pack does not know."""
    model = host.build_model("flux")
    model.model.diffusion_model = type("NewTransformer", (torch.nn.Module,), {"__module__": "comfy.ldm.new.model"})()
    with pytest.raises(ValueError, match=r"GAG cannot reach a text attention in NewTransformer \(Flux\)") as raised:
        host.run_node(node_id, model=model)
    for title in ("SD1.x", "SDXL", "Flux.1", "Wan 2.1"):
        assert title in str(raised.value)


def test_a_model_that_gets_no_words_is_refused() -> None:
    config = {
        "stable_cascade_stage": "b",
        "c_hidden": [32, 32, 32, 32],
        "nhead": [-1, -1, 2, 2],
        "blocks": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "block_repeat": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "c_cond": 32,
    }
    model = host.build("Stable_Cascade_B", config)
    with pytest.raises(ValueError, match=r"cannot guide Stable Cascade's stage B \(StableCascade_B\): .* no words;"):
        host.run_node("GAGuidance", model=model)


def test_a_unet_that_reads_a_picture_is_refused() -> None:
    """Video and view models share SD's UNet, but their cross-attention reads an embedded picture."""
    config = {
        **host.CONFIGS["sd15"][1],
        "in_channels": 8,
        "adm_in_channels": 768,
        "num_classes": "sequential",
        "use_temporal_attention": True,
        "use_temporal_resblock": True,
        "extra_ff_mix_layer": True,
        "use_spatial_context": True,
        "merge_strategy": "learned_with_images",
        "merge_factor": 0.0,
        "video_kernel_size": [3, 1, 1],
    }
    model = host.build("SVD_img2vid", config)
    with pytest.raises(ValueError, match=r"cannot guide SVD_img2vid: it is conditioned on a picture and not on text"):
        host.run_node("GAGuidance", model=model)


def test_a_model_that_the_host_loads_from_a_file_is_guided(tmp_path: Any) -> None:
    """The host's own loader detects the model, as with users' checkpoints; other tests build models directly."""
    config = {
        **host.CONFIGS["sd15"][1],
        "model_channels": 320,
        "channel_mult": [1],
        "num_res_blocks": [1],
        "transformer_depth": [1],
        "transformer_depth_output": [1, 1],
        "context_dim": 768,
    }
    source = host.build("SD15", config)
    weights = {name: weight.half() for name, weight in source.model.diffusion_model.state_dict().items()}
    path = tmp_path / "tiny_sd15.safetensors"
    comfy.utils.save_torch_file(weights, str(path))
    model = comfy.sd.load_diffusion_model(str(path))
    (patched,) = host.run_node("GAGuidance", model=model, preset="paper", strength=1.0)
    generator = torch.Generator().manual_seed(1)
    text = [[torch.randn(1, 77, 768, generator=generator), {}]]
    inputs: dict[str, Any] = {"steps": 1, "positive": text, "negative": text}
    plain, out = host.sample(model, "sd15", **inputs), host.sample(patched, "sd15", **inputs)
    assert torch.isfinite(out).all()
    assert not torch.equal(plain, out)


_ADM = {"num_classes": "sequential"}
SIBLINGS: dict[str, dict[str, Any]] = {
    "SD20": {"use_linear_in_transformer": True},
    "SDXLRefiner": {"adm_in_channels": 2560, **_ADM},
    "SSD1B": {"adm_in_channels": 2816, **_ADM, "transformer_depth_middle": -1},
    "KOALA_700M": {"adm_in_channels": 2816, **_ADM, "transformer_depth_middle": -2},
}


@pytest.mark.parametrize("class_name", SIBLINGS)
def test_other_unets_are_guided(class_name: str, caplog: pytest.LogCaptureFixture) -> None:
    """All text attentions of the default blocks are found, and guided in every model call."""
    model = host.build(class_name, {**host.CONFIGS["sd15"][1], "model_channels": 64, **SIBLINGS[class_name]})
    (patched,) = host.run_advanced(model=model, verbose=True)
    text = [host.conditioning("sd15", seed)[0] for seed in (1, 2)]
    if class_name != "SD20":
        for _, values in text:
            values["pooled_output"] = torch.zeros(1, 1280)
    with caplog.at_level("INFO", logger="comfyui-gag"):
        out = host.sample(patched, "sd15", positive=[text[0]], negative=[text[1]])
    assert torch.isfinite(out).all()
    assert "Guided 6 of 6 attentions in 2 of 2 calls." in caplog.text


def test_a_model_without_options_for_its_attention_is_refused() -> None:
    model = host.build("PixArtAlpha", {
        "image_model": "pixart_alpha", "hidden_size": 32, "depth": 1, "num_heads": 2, "caption_channels": 64,
        "input_size": 8, "micro_condition": False, "model_max_length": 16,
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"GAG cannot guide PixArt \(PixArt\): ComfyUI gives its attention no options"):
        host.run_node("GAGuidance", model=model)
