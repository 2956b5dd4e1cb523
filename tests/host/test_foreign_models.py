# SPDX-License-Identifier: GPL-3.0-or-later
"""Models, blocks and forwards that other packs put in the place of ComfyUI's: refused by name, guided, or named.

The packs are represented by the stand-ins of ``tests/support/foreign_models.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor, nn

import foreign_models as foreign
import host_process as host
from transformers_of_host import TRANSFORMERS

families = host.pack_module("nodes.patching.families")
other_packs = host.pack_module("nodes.patching.other_packs")
# One model of each family whose blocks ComfyUI lets nodes wrap.
WRAPPED = {
    tiny.family: name
    for name, tiny in reversed(TRANSFORMERS.items())
    if any(one.name == tiny.family and one.is_wrapped for one in families.FAMILIES)
}.values()


def guided(model: Any, **settings: Any) -> Any:
    (out,) = host.run_advanced(model=model, **settings)
    return out


NUNCHAKU = (
    "Nunchaku runs its attention in code of its own, without ComfyUI's options; load a file of this model that is not "
    "quantised for Nunchaku, such as an fp8 or GGUF file"
)
OWN_LOADER = "load the model with one of ComfyUI's own loaders"
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Nunchaku's Flux": (foreign.nunchaku_flux, "ComfyFluxWrapper (Flux)", NUNCHAKU),
    "Nunchaku's Qwen-Image": (
        lambda: foreign.qwen_of("NunchakuQwenImageTransformer2DModel", "ComfyUI-nunchaku"),
        "NunchakuQwenImageTransformer2DModel (QwenImage)",
        NUNCHAKU,
    ),
    "TensorRT": (
        foreign.tensorrt,
        "TrTUnet (SDXL)",
        "it is an engine of TensorRT, which was compiled with its attention inside; load the model itself with Load "
        "Checkpoint or Load Diffusion Model",
    ),
    "OneDiff, OneFlow": (
        foreign.oneflow,
        "MixedOneflowDeployableModule (BaseModel)",
        "OneDiff compiled it with its attention inside; take the node of OneDiff out",
    ),
    "OneDiff, nexfort": (
        foreign.nexfort,
        "DeployableModule (BaseModel)",
        "OneDiff compiled it with its attention inside; take the node of OneDiff out",
    ),
    "a subclass whose blocks take no options": (
        lambda: foreign.qwen_of("FastQwen", "ComfyUI-Fast"),
        "FastQwen (QwenImage)",
        "its blocks run code of ComfyUI-Fast (BlockWithoutOptions), which takes no options from ComfyUI, so no node "
        f"can reach its attention; {OWN_LOADER}",
    ),
    "an unknown class that is no module": (
        lambda: foreign.unknown(object),
        "Accelerated (Flux)",
        f"it is no PyTorch module, so no node can reach its attention; {OWN_LOADER}",
    ),
    "an unknown module": (
        lambda: foreign.unknown(nn.Module),
        "Accelerated (Flux)",
        "its class comes from ComfyUI-Fast.2 and not from ComfyUI, and GAG knows no text attention in it; "
        + OWN_LOADER,
    ),
}


@pytest.mark.parametrize("node", ["GAGuidance", "GAGProbe"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_model_whose_attention_no_node_can_reach_is_refused_by_name(case: str, node: str) -> None:
    """The sentence names the class, the true reason and what to do, and lists no family as supported."""
    make, title, reason = REFUSED[case]
    with pytest.raises(ValueError) as error:
        host.run_node(node, model=make())
    assert str(error.value) == f"GAG cannot guide {title}: {reason}, or take the GAG node out of this workflow."


def test_a_model_that_torch_compile_made_is_guided_as_it_is_without_it(node_texts: list[str]) -> None:
    """Its class is torch's, and the original is inside. Here it runs untraced; test_composition.py traces models."""
    model = host.build_model("flux")
    # Not by monkeypatch: it would delete the setting from torch's settings afterwards.
    with torch._dynamo.config.patch(disable=True):
        compiled, plain = (host.sample(guided(one), "flux", steps=1) for one in (foreign.compiled(model), model))
    assert torch.equal(compiled, plain)
    assert node_texts == ["Guided 5 of 5 attentions in 1 of 1 calls."] * 2


ACCEPTED: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[Any], Tensor]]] = {
    "GGUF": (foreign.quantised, lambda: host.build_model("flux"), lambda model: host.sample(model, "flux")),
    "a subclass": (
        lambda: foreign.with_subclass(host.build_model("sd15")),
        lambda: host.build_model("sd15"),
        lambda model: host.sample(model, "sd15"),
    ),
}
if "z-image" in TRANSFORMERS:
    ACCEPTED["Nunchaku's Z-Image"] = (
        foreign.nunchaku_z_image, TRANSFORMERS["z-image"].build, TRANSFORMERS["z-image"].sample
    )  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_model_of_another_pack_that_options_reach_is_guided_as_the_hosts_own(
    case: str, node_texts: list[str]
) -> None:
    make, plain, sample = ACCEPTED[case]
    assert torch.equal(sample(guided(make())), sample(guided(plain())))
    assert node_texts[0] == node_texts[1]
    assert node_texts[0].startswith("Guided")


def parts_of(name: str) -> tuple[list[str], list[str]]:
    family = next(one for one in families.FAMILIES if one.name == TRANSFORMERS[name].family)
    return [part.attribute for part in family.parts], [part.host_name for part in family.parts]


@pytest.mark.parametrize("name", WRAPPED)
def test_blocks_that_another_packs_forward_runs_get_all_that_they_get_without_guidance(
    name: str, node_texts: list[str]
) -> None:
    """Its wrapped blocks would get less, so none is wrapped; still all of them are guided."""
    tiny = TRANSFORMERS[name]
    parts = parts_of(name)
    plain = tiny.build()
    foreign.with_shift(plain, parts[0])
    lossy = foreign.with_lossy_wrapping(tiny.build(), *parts)
    picture = tiny.sample(plain)
    assert not torch.equal(picture, tiny.sample(tiny.build()))
    assert torch.equal(tiny.sample(lossy), picture)
    probed, _ = host.run_node("GAGProbe", model=lossy)
    assert torch.equal(tiny.sample(probed), picture)
    node_texts.clear()
    for settings in ({}, {"blocks": "1"}):
        expected = tiny.sample(guided(plain, **settings))
        assert torch.equal(tiny.sample(guided(lossy, **settings)), expected)
        assert not torch.equal(expected, picture)
    assert node_texts[0::2] == node_texts[1::2]
    assert all(text.startswith("Guided") for text in node_texts)


NOT_REACHED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "blocks of another class": (
        foreign.image_adapter_of_flux,
        "flux",
        "ComfyUI-IPAdapter-Flux (DoubleStreamBlockIPA)",
    ),
    "classes exchanged in place": (foreign.modified_flux, "flux", "ComfyUI-Fluxtapoz (DoubleStreamBlock)"),
    "attention of another class": (foreign.exchanged_attention, "sd15", "RES4LYF (ReCrossAttention)"),
    "a module in the place of the attention": (
        foreign.other_cross_attention,
        "wan-t2v",
        "ComfyUI-Other (OtherCrossAttention)",
    ),
    "attention with another forward": (
        foreign.sage_cross_attention,
        "wan-t2v",
        "ComfyUI-KJNodes (wan_t2v_cross_sageattn_forward)",
    ),
}


@pytest.mark.parametrize("order", ["GAG first", "GAG last"])
@pytest.mark.parametrize("case", NOT_REACHED)
def test_the_node_names_the_code_that_runs_in_the_place_of_the_hosts(
    case: str, order: str, node_texts: list[str], log_messages: Callable[[], str]
) -> None:
    """The picture is as without GAG, in a second run as in the first, when the replaced code is already in place."""
    apply, name, found = NOT_REACHED[case]

    def build() -> Any:
        return TRANSFORMERS[name].build() if name in TRANSFORMERS else host.build_model(name)

    def sample(model: Any) -> Tensor:
        out: Tensor = TRANSFORMERS[name].sample(model) if name in TRANSFORMERS else host.sample(model, name)
        return out

    if order == "GAG first" and apply is foreign.modified_flux:
        return  # it changes the model itself, so that there is no order
    model = apply(guided(build())) if order == "GAG first" else guided(apply(build()))
    plain = sample(apply(build()))
    for _ in range(2):
        assert torch.equal(sample(model), plain)
    assert node_texts == [f"Nothing guided: the blocks run code of {found}."] * 2
    assert f"the blocks run code of {found} and not ComfyUI's own" in log_messages()


def test_the_panel_gets_the_name_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    messages = host.pack_module("nodes.panel.messages")
    status = host.pack_module("nodes.panel.status")
    monkeypatch.setattr(status, "running_client", lambda: "tab")
    monkeypatch.setattr(status, "has_panels", lambda client: client == "tab")
    monkeypatch.setattr(status, "send", lambda event, data: sent.append((event, data)))
    browser = host.pack_module("nodes.panel.browser").BROWSER
    config = host.pack_module("nodes.presets").PRESETS["paper"].config
    guide_model = host.pack_module("nodes.patching.guided_model").guide_model
    model = foreign.exchanged_attention(host.build_model("sd15"))
    host.sample(guide_model(model, config, browser, start_percent=0.0, end_percent=1.0, node_id="7"), "sd15")
    parts = [part for event, data in sent if event == messages.STATUS for part in data["parts"]]
    assert [(values["why"], values["found"]) for _, values in parts] == [
        ("why_other_code", "RES4LYF (ReCrossAttention)")
    ]


def test_model_calls_without_the_options_of_the_run_are_not_called_missing(node_texts: list[str]) -> None:
    """A pack may run the model without ComfyUI's options, so that no call can be counted."""
    host.sample(foreign.without_options(guided(host.build_model("sd15"))), "sd15")
    assert node_texts == ["Nothing guided: no model call reached it."]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("/home/user/Comfy_x_UI/custom_nodes/ComfyUI-Fast_x_2.models.net", "ComfyUI-Fast.2 (Net)"),
        ("C:\\ComfyUI\\custom_nodes\\RES4LYF.sd", "RES4LYF (Net)"),
        ("custom_nodes.prompt.nodes", "prompt (Net)"),
        ("nunchaku.models.transformers", "nunchaku (Net)"),
        ("/srv/custom_nodes/comfy", "comfy (Net)"),
        ("", "Net"),
        ("/srv/" + "x" * 5000, "x" * 29 + "..." + "x" * 28 + " (Net)"),
        ("/srv/a\nb\u202e.c", "a\\nb\\u202e (Net)"),
    ],
)
def test_a_pack_is_named_by_its_folder_alone(module: str, name: str) -> None:
    """Without the path to it, which is the user's own, and without characters that break a line."""
    made = type("Net", (), {"__module__": module})
    assert other_packs.origin(made) == name
    assert not other_packs.is_of_host(made)


def test_a_traced_module_does_not_show_whether_it_takes_options() -> None:
    traced = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    assert other_packs.parameters_of(nn.Linear(2, 2))
    assert other_packs.parameters_of(traced) == []
