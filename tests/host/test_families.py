# SPDX-License-Identifier: GPL-3.0-or-later
"""Every family, with tiny models of the host's own classes: exactly the attention that reads the text is guided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import host_process as host
import reference
from recorder import Call, record_calls
from tiny import Tiny, rank_4
from transformers_of_host import TRANSFORMERS

GuidanceConfig = host.pack_module("gag_core").GuidanceConfig
PAPER = GuidanceConfig()
TOKENS = 12
JOINT = [name for name, tiny in TRANSFORMERS.items() if tiny.text_first is not None]
every_transformer = pytest.mark.parametrize("name", TRANSFORMERS)


UNETS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sdxl": {},
    "SD20": {"use_linear_in_transformer": True},
    "SDXLRefiner": {"num_classes": "sequential", "adm_in_channels": 2560},
    "SSD1B": {"num_classes": "sequential", "adm_in_channels": 2816, "transformer_depth_middle": -1},
    "KOALA_700M": {"num_classes": "sequential", "adm_in_channels": 2816, "transformer_depth_middle": -2},
}
_SD15 = {**host.CONFIGS["sd15"][1], "model_channels": 64}


@pytest.fixture(autouse=True)
def family_in_the_results(request: pytest.FixtureRequest, record_property: Any) -> None:
    """Record the family of the test's model in the results, for the generated page of models."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name in UNETS:
        record_property(f"family of {name}", "unet")
    elif name in TRANSFORMERS:
        record_property(f"family of {name}", TRANSFORMERS[name].family)


def guided(model: Any, **settings: Any) -> Any:
    (out,) = host.run_advanced(model=model, **settings)
    return out


def check(tiny: Tiny, call: Call, config: Any) -> bool:
    """Assert that a call is guided if it reads the text and plain otherwise; return True if it is guided."""
    if not tiny.reads_text(call, TOKENS):
        call.check_plain()
        return False
    call.check(tiny.guided_output(call, config, TOKENS), config.guidance_scale)
    return True


@every_transformer
def test_only_attention_that_reads_the_text_is_guided(name: str, node_texts: list[str]) -> None:
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build())
    with record_calls(model) as calls:
        out = tiny.sample(model, tokens=TOKENS)
    assert torch.isfinite(out).all()
    assert node_texts == [f"Guided {tiny.guided} of {tiny.guided} attentions in 2 of 2 calls."]
    assert sum(check(tiny, call, PAPER) for call in calls) == 2 * tiny.guided  # steps
    assert not torch.equal(out, tiny.sample(tiny.build(), tokens=TOKENS))


@every_transformer
def test_rule_uniform_moves_away_from_the_mean_of_the_text(name: str) -> None:
    """The text's own mean, with its masks and the copies that the host makes of shorter prompts."""
    tiny = TRANSFORMERS[name]
    config = GuidanceConfig(rule="uniform", guidance_scale=0.5)
    model = guided(tiny.build(), rule="uniform", guidance_scale=0.5)
    with record_calls(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    assert sum(check(tiny, call, config) for call in calls) == 2 * tiny.guided  # steps


@every_transformer
def test_off_is_bit_identical_to_no_node(name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    plain = tiny.sample(model)
    assert torch.equal(tiny.sample(guided(model, strength=0.0)), plain)
    assert torch.equal(tiny.sample(guided(model, start_percent=1.0)), plain)
    guided_out = tiny.sample(guided(model))
    assert torch.equal(tiny.sample(model), plain)
    assert not torch.equal(guided_out, plain)


@pytest.mark.parametrize("name", JOINT)
def test_the_text_slice_is_the_part_that_the_prompt_changes(name: str) -> None:
    """In the first block another prompt changes only the keys in the slice, and other noise only the keys outside.

    A change of one token changes one key, or only keys of its own stream if refiners come before the first block.
    """
    tiny = TRANSFORMERS[name]
    model = tiny.build()

    def first_keys(**inputs: Any) -> torch.Tensor:
        with record_calls(model) as calls:
            tiny.sample(model, tokens=TOKENS, **inputs)
        return next(call.k for call in calls if tiny.reads_text(call, TOKENS))

    keys = first_keys()

    def changed_by(**inputs: Any) -> torch.Tensor:
        return (first_keys(**inputs) != keys).any(dim=(0, 1, 3))

    text = torch.zeros(keys.shape[2], dtype=torch.bool)
    text[reference.text_indices(tiny.words(keys.shape[2], TOKENS), keys.shape[2])] = True
    all_tokens = torch.ones_like(text)
    assert torch.equal(changed_by(prompt=20), all_tokens if tiny.prompt_modulates else text)
    by_noise = changed_by(seed=2)
    assert not (by_noise & text).any()
    assert int(by_noise.sum()) == tiny.image_tokens()
    by_patch = changed_by(other_patch=True)
    assert not (by_patch & ~by_noise).any()
    assert int(by_patch.sum()) in (1, tiny.image_tokens())
    by_token = changed_by(other_token=True)
    if not tiny.prompt_modulates:
        assert not (by_token & ~text).any()
        assert int(by_token.sum()) in (1, TOKENS, int(text.sum()))


@every_transformer
def test_apply_to_positive_guides_the_rows_of_the_positive_prompt(name: str) -> None:
    """In each text attention half of the rows are guided, those that read the positive prompt."""
    tiny = TRANSFORMERS[name]
    plain_model, model = tiny.build(), guided(tiny.build(), apply_to="positive")
    with record_calls(plain_model) as alone:
        tiny.sample(plain_model, tokens=TOKENS)
    # The first text attention of each step, in which the keys of the text depend on the prompt and the step alone.
    positive = [call.k[0] for call in alone if tiny.reads_text(call, TOKENS)][:: tiny.guided]
    with record_calls(model) as calls:
        tiny.sample(model, tokens=TOKENS, cfg=4.0)
    texts = [call for call in calls if tiny.reads_text(call, TOKENS)]
    is_plain: list[list[bool]] = []
    for call in texts:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=rank_4(call.mask))[1]
        rows = range(call.q.shape[0])
        is_plain.append([torch.allclose(call.out[row].double(), plain[row], atol=1e-4) for row in rows])
    model_calls = [is_plain[first : first + tiny.guided] for first in range(0, len(texts), tiny.guided)]
    # Prompts of some models run one after the other.
    assert [len(rows) for rows in is_plain] == [len(is_plain[0])] * len(is_plain)
    assert len(model_calls) == 2 * 2 // len(is_plain[0])  # steps, prompts
    for index, (rows_of_layers, first) in enumerate(zip(model_calls, texts[:: tiny.guided], strict=True)):
        assert rows_of_layers == [rows_of_layers[0]] * tiny.guided
        step = index * len(is_plain[0]) // 2
        is_negative = [not _same_keys(tiny, keys, positive[step]) for keys in first.k]
        assert rows_of_layers[0] == is_negative
    assert sum(map(sum, is_plain)) * 2 == sum(map(len, is_plain))


def _same_keys(tiny: Tiny, keys: torch.Tensor, others: torch.Tensor) -> bool:
    """Return True if the keys ``[H, N, D]`` of the text are the same."""
    tokens = keys.shape[1]
    words = torch.arange(tokens)
    if tiny.text_first is not None:
        words = reference.text_indices(tiny.words(tokens, TOKENS), tokens)
    return torch.allclose(keys[:, words], others[:, words], atol=1e-4)


@every_transformer
def test_one_block_can_be_chosen_by_its_index(name: str) -> None:
    tiny = TRANSFORMERS[name]
    model = guided(tiny.build(), blocks="1")
    with record_calls(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    changed = []
    for call in calls:
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=rank_4(call.mask))[1]
        if not torch.allclose(call.out.double(), plain, atol=1e-3 * float(call.v.abs().max())):
            changed.append(call.module)
            assert check(tiny, call, PAPER)
    assert len(changed) == 2  # steps
    assert len(set(changed)) == 1


@pytest.mark.parametrize("name", [name for name, tiny in TRANSFORMERS.items() if tiny.wrapped])
def test_a_block_replacement_of_another_node_works_beside_guidance(name: str) -> None:
    """A node that wraps the same blocks runs as it does alone, around our wrappers or inside them, in both orders."""
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    entered: list[int] = []

    def wrap(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        entered.append(1)
        out: dict[str, Any] = extra["original_block"](args)
        out["img"] = out["img"] * 0.9
        return out

    def wrapped(target: Any) -> Any:
        target = target.clone()
        target.set_model_patch_replace(wrap, "dit", "double_block", 0)
        return target

    first, second = tiny.sample(wrapped(guided(model))), tiny.sample(guided(wrapped(model)))
    assert len(entered) == 4
    assert torch.equal(first, second)
    assert not torch.equal(first, tiny.sample(wrapped(model)))
    assert not torch.equal(first, tiny.sample(guided(model)))


@every_transformer
def test_an_attention_override_of_another_node_works_beside_guidance(name: str) -> None:
    """The other node's attention computes the host's part of every call; guidance is added to its output.

    Some models prepare the text once before they sample, out of the reach of nodes.
    """
    tiny = TRANSFORMERS[name]
    model = tiny.build()
    model.model_options["transformer_options"]["optimized_attention_override"] = halved
    model = guided(model)
    with record_calls(model) as calls:
        tiny.sample(model, tokens=TOKENS)
    for call in calls:
        mask = rank_4(call.mask)
        plain = reference.sparse_dense_attention(call.q, call.k, call.v, mask=mask)[1]
        change = torch.zeros_like(plain)
        if tiny.reads_text(call, TOKENS):
            assert call.has_override
            change = tiny.guided_output(call, PAPER, TOKENS) - plain
        call.check((0.5 if call.has_override else 1.0) * plain + change, PAPER.guidance_scale)


def halved(function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Stand-in for a node that replaces attention; half the output is recognisable in results."""
    return 0.5 * function(*args, **kwargs)


@every_transformer
def test_a_model_belongs_to_its_family(name: str) -> None:
    tiny = TRANSFORMERS[name]
    family, blocks = host.pack_module("nodes.patching.families").family_of(tiny.build())
    assert family.name == tiny.family
    assert sum(map(len, blocks.values())) == tiny.guided


@pytest.mark.parametrize("name", UNETS)
def test_unets_are_guided_in_their_text_cross_attention(name: str) -> None:
    model = host.build_model(name) if name in host.CONFIGS else host.build(name, {**_SD15, **UNETS[name]})
    prompt = host.conditioning("sdxl", 3, tokens=11)
    model = guided(model)
    with record_calls(model) as calls:
        host.sample(model, "sd15", positive=prompt, negative=prompt)
    guided_calls = 0
    for call in calls:
        if call.module.endswith("attn2") and "middle" not in call.module:
            call.check(reference.guided_attention(call.q, call.k, call.v, PAPER), PAPER.guidance_scale)
            guided_calls += 1
        else:
            call.check_plain()
    assert guided_calls == 2 * sum("attn2" in name and name.endswith("to_q") for name in _down_and_up(model))


def _down_and_up(model: Any) -> list[str]:
    return [name for name, _ in model.model.diffusion_model.named_modules() if not name.startswith("middle")]
