# SPDX-License-Identifier: GPL-3.0-or-later
"""The patch gives the same picture in copies and in other processes.

Multi-GPU nodes copy the patched model, and Ray-based packs send it to other processes. The patch on a model is plain
data, before and after a run.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import host_process as host
import other_process
from other_process import Sampled

FAMILIES = ["sd15", "flux"]
SUPPORT = Path(other_process.__file__).parent
DEV = SUPPORT.parents[1] / "dev"


def models_can_be_copied() -> bool:
    """Return False on later hosts, whose configurations return None for the attributes that copy and pickle look up."""
    try:
        copy.deepcopy(host.build_model("flux").model.model_config)
    except TypeError:
        return False
    return True


# These tests need a host whose own models can be sent. The patch alone is sent on every host.
whole_models = pytest.mark.skipif(
    not models_can_be_copied(), reason="models of this ComfyUI cannot be copied or pickled, with or without guidance"
)


def guided_twice(name: str) -> Any:
    """Return a model with two GAG nodes that act in different ranges of the run."""
    model = host.build_model(name)
    model = host.guide(model, "paper", end_percent=0.5, schedule=[0.5, 1.0])
    return host.guide(model, start_percent=0.5, guidance_scale=3.0, apply_to="positive", verbose=True)


def patch_of(model: Any) -> Any:
    """Return everything that a node leaves on a ModelPatcher."""
    return model.wrappers, model.model_options


def check_same(there: Sampled, here: Sampled) -> None:
    assert np.array_equal(there[0], here[0])
    assert any("Guided " in text for text in here[1])
    assert there[1] == here[1]


# --- other processes ----------------------------------------------------------------------------------------------


def test_a_spawned_process_gives_the_same_picture_with_the_pickled_patch() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in FAMILIES:
            model = guided_twice(name)
            patch = pickle.dumps(patch_of(model))
            here = other_process.sampled(model, name)
            plain = other_process.sampled(host.build_model(name), name)
            there = pool.submit(other_process.sampled_with_patch, patch, name).result()
            check_same(there, here)
            assert not np.array_equal(there[0], plain[0])


if sys.version_info < (3, 14):  # Ray does not support later versions yet

    @pytest.fixture(scope="module")
    def worker() -> Iterator[Any]:
        """An actor of a private Ray instance that only this machine can reach."""
        # The folder has sockets, whose paths have a limited length.
        folder = tempfile.mkdtemp(prefix="ray", dir="/tmp" if Path("/tmp").is_dir() else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            # Otherwise Ray creates a token and stores it in the user's home.
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))
            import ray
            from ray._private import ray_constants

            # Only this setting makes Ray listen on the loopback address alone, whatever address it is given.
            patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": {"PYTHONPATH": f"{SUPPORT}{os.pathsep}{DEV}", "OMP_NUM_THREADS": "1"}},
            )
            try:
                yield ray.remote(other_process.Worker).remote()
            finally:
                ray.shutdown()
                shutil.rmtree(folder, ignore_errors=True)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_ray_worker_gives_the_same_picture_with_the_pickled_patch(worker: Any, name: str) -> None:
        import ray

        model = guided_twice(name)
        there = ray.get(worker.sampled_with_patch.remote(pickle.dumps(patch_of(model)), name))
        check_same(there, other_process.sampled(model, name))

    @whole_models
    @pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a run"])
    @pytest.mark.parametrize("name", FAMILIES)
    def test_a_ray_worker_gives_the_same_picture_with_the_whole_model(worker: Any, name: str, ran_before: bool) -> None:
        """Ray sends the model as it sends any object, with weights and patches."""
        import ray

        model = guided_twice(name)
        if ran_before:
            host.sample(model, name)
        there = ray.get(worker.sampled.remote(model, name))
        check_same(there, other_process.sampled(model, name))


# --- copies in this process ---------------------------------------------------------------------------------------


def objects_in(value: Any, visited: set[int]) -> Iterator[Any]:
    """Yield an object and all objects that it refers to."""
    if id(value) in visited or isinstance(value, type) or (callable(value) and not hasattr(value, "__self__")):
        return
    visited.add(id(value))
    yield value
    children: list[Any] = (
        [getattr(value, "__self__", None), *vars(value).values()] if hasattr(value, "__dict__") else []
    )
    if isinstance(value, dict):
        children += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        children += value
    if hasattr(value, "__self__"):
        children.append(value.__self__)
    for child in children:
        yield from objects_in(child, visited)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_patch_holds_no_tensor_and_no_device(name: str) -> None:
    model = guided_twice(name)
    before = pickle.dumps(patch_of(model))
    host.sample(model, name)
    assert pickle.dumps(patch_of(model)) == before, "a run left something on the model"
    types = {type(value) for value in objects_in(patch_of(model), set())}
    assert host.pack_module("nodes.patching.guidance").Guidance in types, "the search did not reach the patch"
    assert not {kind for kind in types if kind.__module__.split(".")[0] == "torch"}
    assert len(before) < 20_000


@whole_models
@pytest.mark.parametrize("name", FAMILIES)
def test_a_deep_copy_gives_the_same_picture(name: str) -> None:
    model = guided_twice(name)
    copied = copy.deepcopy(model)
    assert copied.model is not model.model
    check_same(other_process.sampled(copied, name), other_process.sampled(model, name))


def for_another_device(model: Any, name: str) -> Any:
    """Return a clone on other weights, copied by the host, or as nodes copied models before the host could."""
    if hasattr(model, "deepclone_multigpu"):
        model.cached_patcher_init = (host.build_model, (name,))  # as loaders set it
        return model.deepclone_multigpu()
    clone = model.clone()
    clone.model = copy.deepcopy(model.model)
    clone.model.current_patcher = clone
    return clone


@pytest.mark.parametrize("name", FAMILIES)
def test_a_copy_for_another_device_gives_the_same_picture(name: str) -> None:
    model = guided_twice(name)
    clone = for_another_device(model.clone(), name)
    assert clone.model is not model.model
    check_same(other_process.sampled(clone, name), other_process.sampled(model, name))


def test_guiding_a_clone_again_does_not_change_the_first_model() -> None:
    model = guided_twice("sd15")
    before = host.sample(model, "sd15")
    (again,) = host.run_node("GAGuidance", model=model.clone(), preset="paper", strength=1.0)
    assert not torch.equal(host.sample(again, "sd15"), before)
    assert torch.equal(host.sample(model, "sd15"), before)
