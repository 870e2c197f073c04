"""Model folders: what is in one, whether it can be trusted, and the network with its weights.

Two layouts are read. Meta's: ``params.json`` and ``consolidated.NN.pth`` (meta_shards.py), in the folder or in its
``original/``. Hugging Face's: ``config.json`` and ``model.safetensors``, whole or in shards that
``model.safetensors.index.json`` lists. ``open_checkpoint`` looks at everything but the weights' values, so a bad folder
is refused in a moment and before memory is taken.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llama_stack.errors import CheckpointError

from .config import LlamaConfig
from .meta_shards import MetaShards
from .model import Llama
from .parallel import Rank, empty_part
from .quantize import RoundedLinear, empty_rounded, stored_matrices
from .rounded_weights import RoundedWeights, described, stored_kind
from .safetensors_weights import SafetensorsWeights, hugging_face_name

_LARGEST_JSON_BYTES = 2_000_000
_META_SHARD = re.compile(r"consolidated(?:\.(\d\d))?\.pth")
_HUGGING_FACE_WHOLE = "model.safetensors"
_HUGGING_FACE_INDEX = "model.safetensors.index.json"
_MOST_NAMED = 5
_SCORING = "LlamaForSequenceClassification"
_SCORE = "score.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that has been checked: its weights are all there, in the right shapes, and nothing else is."""

    folder: Path
    """Where the weights are: the folder asked for, or its ``original/``."""
    layout: Literal["meta", "hugging_face"]
    config: LlamaConfig
    dtype: torch.dtype
    """How the weights are stored."""
    weight_files: tuple[Path, ...]
    tokenizer_file: Path | None
    eos_ids: tuple[int, ...]
    """Token ids that end a generation, as the folder states them; empty when it states none."""
    rounding: str | None
    """Which of ``quantize.KINDS`` its matrices are; None where they are in ``dtype`` too."""
    has_score: bool
    """Whether it is a reward model: in the place of an output it has a row that states are scored by."""
    remarks: tuple[str, ...]
    """What an operator should know about how the folder was read, such as a choice between two layouts in it."""

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's file; CheckpointError when the folder has none."""
        if self.tokenizer_file is None:
            raise CheckpointError(f"{self.folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there")
        return self.tokenizer_file


def open_checkpoint(folder: Path, *, has_score: bool = False) -> Checkpoint:
    """Return what a model folder holds, after checking all of it but the weights' values; takes little memory.

    It must be a language model or, with ``has_score``, a reward model, which has Hugging Face's layout of a
    ``LlamaForSequenceClassification`` with one label: no output, and ``score.weight`` of (1, D). With both layouts
    there, Hugging Face's is taken (its safetensors hold no code) and ``remarks`` says so.
    Raises CheckpointError that says what was found, what is missing and where.
    """
    try:
        checkpoint = _open(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {_reason(error)}") from None
    if checkpoint.has_score != has_score:
        kinds = ("a language model, which gives no scores", "a reward model, which writes nothing")
        raise CheckpointError(f"{folder}: is {kinds[checkpoint.has_score]}")
    return checkpoint


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    rank: Rank | None = None,
    rounding: str | None = None,
) -> Llama:
    """Return the network with the checkpoint's weights, converted to ``dtype``, in memory of its own on ``device``.

    With a ``rank``, which has joined the others, it is that rank's part, whatever shards the checkpoint has. With a
    ``rounding``, one of ``quantize.KINDS``, matrices are rounded to that instead; there is no rank then.

    Weights go one at a time: the peak is the network and one weight. Nothing stays mapped, so a file that changes later
    cannot change or crash a running network. Raises CheckpointError when the files are no longer what
    ``open_checkpoint`` saw, and for a weight that is not finite in ``dtype``: every answer would be noise.
    """
    config = checkpoint.config
    weights = _open_weights(checkpoint.layout, checkpoint.weight_files, config, checkpoint.rounding)
    _check_weights(checkpoint.folder, weights, config, has_score=checkpoint.has_score)
    if rank is not None:
        model = empty_part(config, device=device, dtype=dtype)
    elif rounding is not None:
        model = empty_rounded(config, rounding, device=device, dtype=dtype)
    else:
        model = Llama(config, device="meta", dtype=dtype).to_empty(device=device)
    try:
        with torch.no_grad():
            for name, shape in _shapes(config).items():
                owner = model.get_submodule(name.removesuffix(".weight"))
                if (
                    isinstance(owner, RoundedLinear)
                    and isinstance(weights, RoundedWeights)
                    and weights.kind == rounding
                ):
                    weights.restore(name, owner, config)
                    _check_finite(checkpoint, weights.stored_name(name), owner.dense(dtype))
                    continue
                is_in_place = rank is None and not isinstance(owner, RoundedLinear)
                whole = owner.weight if is_in_place else torch.empty(shape, dtype=dtype)
                assert isinstance(whole, Tensor)
                weights.copy_into(name, whole, config)
                _check_finite(checkpoint, weights.stored_name(name), whole)
                if isinstance(owner, RoundedLinear):
                    owner.fill(whole)
                elif rank is not None:
                    assert isinstance(owner.weight, Tensor)
                    owner.weight.copy_(rank.part(name, whole))
            if config.tied_embeddings and rounding is not None:
                head = model.get_submodule("output")
                assert isinstance(head, RoundedLinear)
                head.fill(model.tok_embeddings.weight)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.folder}: changed while it was read: {_reason(error)}") from None
    return model


def load_score(checkpoint: Checkpoint) -> Tensor:
    """Return (1, D) float32, on the CPU: what a reward model's states are scored by. Raises CheckpointError."""
    assert checkpoint.has_score
    score_1D = torch.empty(1, checkpoint.config.dim)
    try:
        weights = SafetensorsWeights(checkpoint.weight_files)
        weights.check_shape(_SCORE, (1, checkpoint.config.dim))
        weights.copy_into(_SCORE, score_1D, checkpoint.config)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.folder}: changed while it was read: {_reason(error)}") from None
    _check_finite(checkpoint, _SCORE, score_1D)
    return score_1D


def save_hugging_face(
    model: Llama,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    bos_id: int | None = None,
    eos_ids: Sequence[int] = (),
    score: Tensor | None = None,
    pad_id: int | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and, with ``eos_ids``, ``generation_config.json`` into ``folder``.

    With a ``score``, (1, D), it is a reward model, whose network must have no output of its own; ``pad_id`` lets
    transformers score several sequences at a time.

    Weights are stored in ``dtype``, by default the model's, and rounded matrices as they are. The folder is made if
    needed; a model in this layout that is in it is replaced. Its ``config.json`` goes first and the new one comes last,
    so a save that was cut off leaves a folder that is refused, never one with old and new files mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "generation_config.json", _HUGGING_FACE_INDEX):
        (folder / name).unlink(missing_ok=True)
    stored_dtype = dtype or model.tok_embeddings.weight.dtype
    tensors = {
        hugging_face_name(name): weight.detach().to("cpu", stored_dtype).contiguous()
        for name, weight in model.named_parameters()
    }
    rounding = None
    for matrix_name, matrix in stored_matrices(model).items():
        rounding = matrix.kind
        for name, kept in matrix.named_buffers(prefix=matrix_name):
            tensors[hugging_face_name(name)] = kept.cpu()
    if score is not None:
        assert model.output is None
        tensors[_SCORE] = score.detach().to("cpu", stored_dtype)
    aside = folder / f"{_HUGGING_FACE_WHOLE}.part"
    save_file(tensors, aside, metadata={"format": "pt"})
    _settle(aside, folder / _HUGGING_FACE_WHOLE)
    token_ids: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": list(eos_ids) or None}
    if eos_ids:
        _write_json(folder / "generation_config.json", token_ids)
    values = model.config.to_hugging_face() | token_ids | {"torch_dtype": str(stored_dtype).removeprefix("torch.")}
    if rounding is not None:
        values["quantization_config"] = described(rounding)
    if score is not None:
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "pad_token_id": pad_id}
        values |= labels | {"architectures": [_SCORING], "tie_word_embeddings": False}
    _write_json(folder / "config.json", values)


class _Weights(Protocol):
    """The weights of one checkpoint, by model.py's names."""

    names: frozenset[str]

    def stored_name(self, name: str) -> str: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None: ...

    def copy_into(self, name: str, weight: Tensor, config: LlamaConfig) -> None: ...


def _open(folder: Path) -> Checkpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder" if folder.exists() else f"{folder}: no such folder")
    original = folder / "original"
    homes = [folder, original] if original.is_dir() else [folder]
    meta_home = next((home for home in homes if (home / "params.json").exists() and _shard_names(home)), None)
    weight_files = [name for name in (_HUGGING_FACE_INDEX, _HUGGING_FACE_WHOLE) if (folder / name).exists()]
    if (folder / "config.json").exists() and weight_files:
        remarks = [] if meta_home is None else [f"{meta_home} also has Meta's layout; read Hugging Face's"]
        return _open_hugging_face(folder, remarks)
    if meta_home is not None:
        return _open_meta(meta_home, homes)
    raise CheckpointError(f"{folder}: {_what_is_missing(homes)}; found: {_listing(folder)}")


def _open_hugging_face(folder: Path, remarks: Sequence[str]) -> Checkpoint:
    raw_config = read_json(inside(folder, "config.json"))
    rounding = stored_kind(raw_config)
    if rounding is not None:
        del raw_config["quantization_config"]
    has_score = raw_config.get("architectures") == [_SCORING]
    if has_score:
        # A network whose output is its table has no other, and none is needed.
        raw_config |= {"architectures": None, "tie_word_embeddings": True}
    config = LlamaConfig.from_hugging_face(raw_config)
    files = _hugging_face_files(folder)
    weights = _open_weights("hugging_face", files, config, rounding)
    _check_weights(folder, weights, config, has_score=has_score)
    generation: Mapping[str, Any] = {}
    if (folder / "generation_config.json").exists():
        generation = read_json(inside(folder, "generation_config.json"))
    return Checkpoint(
        folder=folder,
        layout="hugging_face",
        config=config,
        dtype=weights.dtype("tok_embeddings.weight"),
        weight_files=files,
        tokenizer_file=_tokenizer_file([folder, folder / "original"]),
        eos_ids=_eos_ids(folder, generation) or _eos_ids(folder, raw_config),
        rounding=rounding,
        has_score=has_score,
        remarks=tuple(remarks),
    )


def _hugging_face_files(folder: Path) -> tuple[Path, ...]:
    if not (folder / _HUGGING_FACE_INDEX).exists():
        return (inside(folder, _HUGGING_FACE_WHOLE),)
    index_file = inside(folder, _HUGGING_FACE_INDEX)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: weight_map must map tensor names to file names")
    names = set(weight_map.values()) if all(isinstance(name, str) for name in weight_map.values()) else {""}
    for name in sorted(names):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
            raise CheckpointError(
                f"{index_file}: {name[:80]!r} is not the plain name of a .safetensors file in this folder"
            )
    return tuple(inside(folder, name) for name in sorted(names))


def _open_meta(home: Path, homes: Sequence[Path]) -> Checkpoint:
    params = read_json(inside(home, "params.json"))
    files = _meta_files(home)
    weights = MetaShards(files)
    config = LlamaConfig.from_meta(params, tied_embeddings="output.weight" not in weights.names)
    _check_weights(home, weights, config)
    remarks = [] if home == homes[0] else [f"read from {home}"]
    if config.tied_embeddings:
        remarks.append("there is no output.weight: the embeddings serve as output")
    if config.rope_scaling is not None and params.get("rope_scaling_factor") is None:
        remarks.append(
            f"params.json has no rope_scaling_factor: took {config.rope_scaling.factor:g}, "
            "which is published for models of this size"
        )
    return Checkpoint(
        folder=home,
        layout="meta",
        config=config,
        dtype=weights.dtype("tok_embeddings.weight"),
        weight_files=files,
        tokenizer_file=_tokenizer_file([home, *homes]),
        eos_ids=(),
        rounding=None,
        has_score=False,
        remarks=tuple(remarks),
    )


def _shard_names(home: Path) -> list[str]:
    return sorted(name for name in os.listdir(home) if _META_SHARD.fullmatch(name))


def _meta_files(home: Path) -> tuple[Path, ...]:
    """Return a Meta folder's shards in rank order; CheckpointError when one of the row is not there."""
    names = _shard_names(home)
    ranks = {int(match[1]) for name in names if (match := _META_SHARD.fullmatch(name)) and match[1]}
    missing = [f"consolidated.{rank:02}.pth" for rank in range(max(ranks, default=0)) if rank not in ranks]
    if missing:
        raise CheckpointError(f"{home}: shards are missing: {_some(missing)}; found: {_some(names)}")
    if ranks and len(names) != len(ranks):
        raise CheckpointError(f"{home}: which shards belong together cannot be told; found: {_some(names)}")
    return tuple(inside(home, name) for name in names)


def _open_weights(
    layout: Literal["meta", "hugging_face"], files: Sequence[Path], config: LlamaConfig, rounding: str | None
) -> _Weights:
    if rounding is not None:
        return RoundedWeights(files, config, rounding)
    return MetaShards(files) if layout == "meta" else SafetensorsWeights(files)


def _check_weights(folder: Path, weights: _Weights, config: LlamaConfig, *, has_score: bool = False) -> None:
    """Refuse a folder whose weights are not exactly those of its config."""
    shapes = _shapes(config) | ({_SCORE: (1, config.dim)} if has_score else {})
    missing = [weights.stored_name(name) for name in shapes if name not in weights.names]
    # A tied output may be stored as well; the embeddings stand for it.
    tolerated = {"output.weight"} if config.tied_embeddings else set()
    unexpected = [weights.stored_name(name) for name in sorted(weights.names - shapes.keys() - tolerated)]
    faults = [f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if faults:
        raise CheckpointError(f"{folder}: the weights do not fit the config; {'; '.join(faults)}")
    for name, shape in shapes.items():
        weights.check_shape(name, shape)


def _check_finite(checkpoint: Checkpoint, stored_name: str, weight: Tensor) -> None:
    # A NaN spreads to both extremes. Finding them takes a tenth of the copy's time, isfinite() several times as much.
    if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(weight)):
        dtype = str(weight.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{checkpoint.folder}: {stored_name} holds NaN or infinity, or numbers too large for {dtype}"
        )


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each weight of the network, by its name."""
    weights = Llama(config, device="meta", dtype=torch.float32).named_parameters()
    return {name: tuple(weight.shape) for name, weight in weights}


def inside(folder: Path, name: str) -> Path:
    """Return the path of a regular file in the folder, also through a link, as long as it stays in there.

    Hugging Face's cache is the one exception: its ``snapshots/REVISION/`` links to the ``blobs/`` beside it.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        is_regular = stat.S_ISREG(real.stat().st_mode)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from None
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not real.is_relative_to(home) and (blobs is None or real.parent != blobs):
        raise CheckpointError(f"{path}: a link that leaves the folder")
    if not is_regular:
        raise CheckpointError(f"{path}: not a regular file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of bounded size. Raises CheckpointError."""
    size = path.stat().st_size
    if size > _LARGEST_JSON_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; at most {_LARGEST_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _eos_ids(path: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    ids = values.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(token) is int and token >= 0 for token in listed):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them; found {str(ids)[:80]}")
    return tuple(listed)


def _tokenizer_file(homes: Sequence[Path]) -> Path | None:
    for home in homes:
        for name in ("tokenizer.json", "tokenizer.model"):
            if (home / name).exists():
                return inside(home, name)
    return None


def _what_is_missing(homes: Sequence[Path]) -> str:
    """Say what a folder without a loadable layout lacks, by what it has the beginnings of."""
    folder = homes[0]
    if (folder / "config.json").exists():
        return f"config.json is there, but neither {_HUGGING_FACE_WHOLE} nor {_HUGGING_FACE_INDEX}"
    if any((folder / name).exists() for name in (_HUGGING_FACE_WHOLE, _HUGGING_FACE_INDEX)):
        return "safetensors weights are there, but no config.json"
    for home in homes:
        if (home / "params.json").exists():
            return f"{home / 'params.json'} is there, but no consolidated.NN.pth"
        if _shard_names(home):
            return f"{home} has consolidated shards, but no params.json"
    return "no model: config.json with model.safetensors, or params.json with consolidated.NN.pth"


def _listing(folder: Path) -> str:
    return _some(sorted(os.listdir(folder))) or "nothing"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(name[:120] for name in names[:_MOST_NAMED]) + more


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _settle(aside, path)


def _settle(aside: Path, path: Path) -> None:
    """Give a finished file its name, durably."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
