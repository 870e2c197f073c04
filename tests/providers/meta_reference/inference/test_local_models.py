"""Models that this stack has made are served while it runs: adapters on their base, whole weights beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_stack_meta_reference.config import MetaReferenceConfig
from llama_stack_meta_reference.inference.provider import MetaReferenceInference, serve

from llama_stack.apis.common import SamplingParams
from llama_stack.apis.inference import CompletionRequest, CompletionResponse, LocalModel
from llama_stack.errors import AlreadyExistsError, CheckpointError, ModelNotFoundError
from tests.providers.meta_reference import checkpoints, small_tokenizer
from tests.providers.meta_reference.adapters import tuned

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the same sizes, and an adapter that fits both."""
    root = tmp_path_factory.mktemp("local")
    for seed, name in enumerate(("base", "whole")):
        reference = checkpoints.random_reference(vocabulary=856, seed=seed)
        checkpoints.write_hugging_face(reference, root / name)
        small_tokenizer.write_hugging_face(root / name)
    tuned(checkpoints.random_reference(vocabulary=856), root / "adapter")
    return root


async def text(provider: MetaReferenceInference, model: str) -> str:
    asked = CompletionRequest(model=model, content="The cat", max_tokens=12, sampling_params=SamplingParams())
    answer = await provider.completion(asked)
    assert isinstance(answer, CompletionResponse)
    return str(answer.content)


async def test_what_the_stack_made_is_served_without_a_restart_and_withdrawn(folders: Path) -> None:
    """An adapter runs on the base in memory, also on whole weights that came the same way; lineage is listed."""
    config = {"models": {"m": {"checkpoint": str(folders / "base"), "device": "cpu", "process": "shared"}}}
    async with serve(MetaReferenceConfig.model_validate(config | {"aliases": {"llama3_8b": "m"}})) as provider:
        whole = LocalModel("job-1", folders / "whole", base="llama3_8b", lineage={"job": "job-1"})
        adapter = LocalModel("job-2", folders / "adapter", base="job-1", is_adapter=True, lineage={"job": "job-2"})
        before = await text(provider, "m")
        assert await provider.serve_local(whole)
        assert await provider.serve_local(adapter)
        assert await provider.serve_local(whole), "the same again is a success"
        assert len({before, await text(provider, "job-1"), await text(provider, "job-2")}) == 3
        listed = {model.model: model.metadata for model in await provider.models()}
        assert (listed["job-1"]["job"], listed["job-2"]["adapter_of"]) == ("job-1", "job-1")
        found = {model.model: model for model in await provider.local_models()}
        assert found["job-2"] == adapter
        assert (found["job-1"].folder, found["m"].aliases) == (folders / "whole", ("llama3_8b",))
        assert not await provider.withdraw_local("job-1"), "its adapter needs it"
        assert await provider.withdraw_local("job-2")
        assert await provider.withdraw_local("job-1")
        assert not await provider.withdraw_local("m"), "the distribution names it"
        with pytest.raises(ModelNotFoundError):
            await text(provider, "job-1")
        assert await text(provider, "m") == before


async def test_what_cannot_be_served_leaves_everything_as_it_was(folders: Path, tmp_path: Path) -> None:
    """Taken names, unknown bases and folders that hold no model."""
    config = {"models": {"m": {"checkpoint": str(folders / "base"), "device": "cpu", "process": "shared"}}}
    async with serve(MetaReferenceConfig.model_validate(config | {"aliases": {"other": "m"}})) as provider:
        assert not await provider.serve_local(LocalModel("job", folders / "whole", base="elsewhere"))
        assert not await provider.serve_local(LocalModel("job", folders / "whole"))
        for name in ("m", "other"):
            for is_adapter in (False, True):
                with pytest.raises(AlreadyExistsError):
                    await provider.serve_local(LocalModel(name, folders / "whole", base="m", is_adapter=is_adapter))
        with pytest.raises(CheckpointError):
            await provider.serve_local(LocalModel("job", tmp_path, base="m"))
        with pytest.raises(CheckpointError):
            await provider.serve_local(LocalModel("job", tmp_path, base="m", is_adapter=True))
        assert {model.model for model in await provider.models()} == {"m", "other"}
