# SPDX-License-Identifier: GPL-3.0-or-later
"""The patching engine: from the settings of a node to a guided attention call. No node class, no web server.

Read in this order:

==================  ====================================================================================
guidance            ``Guidance``: settings of one GAG node, resolved for a model
guided_model        guided or measured clones of a ModelPatcher: the functions that nodes call
patch               ``GAGPatch``: the two wrappers on a clone, around a run and around a model call
run                 ``Run``: counters of one sampling run, and the report at its end
families            one entry per model family: class, blocks, and how its text is found
block_syntax        the text in which users name blocks, ``d1,u0-2`` or ``double 0-18``
prompt_rows         which prompt each row of a batch belongs to, and how many of its tokens are its own
host_attention      the attention that ComfyUI would run without GAG: override, stored attention, backend
attention_call      ``AttentionCall``: one attention call of the host, and its output with guidance
unet                hooks of one model call of a UNet
transformer         hooks of one model call of a transformer
text_position       where the text is in models whose streams do not show it
replacement         the tokens that an attn2 replacement of another node reads
other_packs         code of other packs in the place of ComfyUI's, and models whose attention no node can reach
steps               where in its run a model call is
strength_curve      the strength as a function of the step
compile             torch.compile for guided model calls, where the host's own compiled graph ignores patches
measurements        ``Probe`` and ``Result``: what GAG Probe asks for and gets
allocation          pause of ComfyUI's allocation recorder, for tensors that are kept and for the check of kernels
recorder            samples of each text attention, gathered during a run for a probe or a chart
observer            the interface to whoever watches runs: the browser, in nodes/panel
==================  ====================================================================================
"""
