"""From one model's configuration to what executes it: device, type, memory plan, weights.

Everything that can be refused is refused before weights are read, and an operator sees the plan first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import torch

from llama_stack.errors import CheckpointError, SetupError

from ..config import ModelConfig
from ..llama.checkpoint import Checkpoint, load_model, open_checkpoint
from ..llama.config import LlamaConfig
from ..llama.parallel import Rank, possible_ranks
from ..llama.quantize import KINDS
from ..native.library import WIDEST_HEAD, KernelsUnavailableError, library
from .draft_network import DraftNetwork
from .executor import ModelFacts
from .kv_cache import BLOCK_TOKENS
from .local_executor import LocalExecutor
from .measuring import fastest_type
from .memory_plan import MemoryPlan, available_memory, memory_plan
from .native_runner import NativeRunner, NativeStorage, supports
from .paged_views import FLASH_BLOCK_TOKENS, has_flash
from .processors import usable_cores
from .runner import Runner, Storage, TorchRunner, TorchStorage

logger = logging.getLogger("llama_stack.meta_reference.loading")

# How much of the free memory weights and cache may take when the configuration does not fix them: a step needs
# some, and a CPU's memory is not ours alone.
_SHARE = {"cuda": 0.9, "cpu": 0.5}
_HALVES = (torch.bfloat16, torch.float16)
_FLOAT8_CAPABILITY = (8, 9)
"""Of the first GPUs that multiply float8: Ada and Hopper."""


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint that has been looked at, and what is to be made of it."""

    name: str
    checkpoint: Checkpoint
    device: torch.device
    storage: Storage
    plan: MemoryPlan
    rank: Rank | None
    draft: _Draft | None
    static_rows: int
    """Steps of up to so many tokens run as CUDA graphs."""
    compiler: str | None
    """What compiles them, of the backends of ``torch.compile``."""

    @property
    def facts(self) -> ModelFacts:
        """What there is to know of it without tensors."""
        network, plan = self.checkpoint.config, self.plan
        return ModelFacts(
            layout=self.checkpoint.layout,
            tokenizer=str(self.checkpoint.tokenizer),
            draft_tokenizer=str(self.draft.checkpoint.tokenizer) if self.draft else None,
            vocabulary=network.vocab_size,
            eos_ids=self.checkpoint.eos_ids,
            parameters=network.parameter_count,
            trained_context=network.max_context,
            device=str(self.device),
            dtype=self.storage.name,
            kernels="compiled" if isinstance(self.storage, NativeStorage) else "plain",
            context=plan.context,
            blocks=plan.blocks,
            block_tokens=plan.block_tokens,
            weight_bytes=plan.weight_bytes,
            cache_bytes=plan.cache_bytes,
        )

    def load(self, vocabulary: int) -> LocalExecutor:
        """Read the weights, which may take long; of a network's tokens the first ``vocabulary`` are picked.

        Raises ``CheckpointError`` when the folder has changed or its numbers are not finite, ``SetupError`` when they
        cannot be kept as was asked for.
        """
        began = monotonic()
        if self.draft is not None and (known := self.draft.checkpoint.config.vocab_size) < vocabulary:
            raise CheckpointError(
                f"{self.draft.checkpoint.folder}: knows {known} tokens of the {vocabulary} that a draft network needs"
            )
        if self.device.type == "cpu":
            ranks = self.rank.count if self.rank else 1
            torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores()) // ranks))
        if self.rank is not None:
            self.rank.join(self.device)
        runner = _runner(self, self.checkpoint, self.storage, self.rank)
        draft = None
        if self.draft is not None:
            draft = DraftNetwork(_runner(self, self.draft.checkpoint, self.draft.storage, None), vocabulary)
        logger.info("model %r: ready on %s, weights and cache in %.2f s", self.name, self.device, monotonic() - began)
        return LocalExecutor(runner, vocabulary, draft)


@dataclass(frozen=True)
class _Draft:
    """The draft network beside a model: its cache has as many blocks, and its memory is part of the model's plan."""

    checkpoint: Checkpoint
    storage: Storage


@dataclass(frozen=True)
class _Both:
    """The ``Storage`` of a model and of the draft network beside it."""

    main: Storage
    draft: _Draft

    @property
    def name(self) -> str:
        """As the model's."""
        return self.main.name

    def weight_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``."""
        return self.main.weight_bytes(config) + self.draft.storage.weight_bytes(self.draft.checkpoint.config)

    def loading_bytes(self, config: LlamaConfig) -> int:
        """See ``Storage``; one is loaded after the other."""
        draft = self.draft.storage.loading_bytes(self.draft.checkpoint.config)
        return max(self.main.loading_bytes(config), self.main.weight_bytes(config) + draft)

    def cache_bytes_per_token(self, config: LlamaConfig) -> int:
        """See ``Storage``."""
        draft = self.draft.storage.cache_bytes_per_token(self.draft.checkpoint.config)
        return self.main.cache_bytes_per_token(config) + draft


def open_model(name: str, config: ModelConfig, rank: Rank | None = None, dtype: str | None = None) -> OpenModel:
    """Look at a checkpoint, settle where and how it runs, and plan its memory; takes little time.

    With a ``rank`` all of that is for its part of the network. A ``dtype`` is what an earlier call settled for the
    network, and takes the place of the configuration's; a draft network's is settled anew.

    Raises ``CheckpointError`` for a bad folder and ``SetupError`` for what this machine cannot do.
    """
    device = _device(name, config.device, rank)
    checkpoint = _opened(name, "checkpoint", config.folder)
    if rank is not None:
        _check_split(name, checkpoint.config, rank)
    storage = _storage(name, config.model_copy(update={"dtype": dtype or config.dtype}), checkpoint, device)
    for remark in checkpoint.remarks:
        logger.info("model %r: %s", name, remark)
    draft, network, planned = None, checkpoint.config, storage
    if config.draft is not None:
        drafting = _opened(name, "draft.checkpoint", config.draft.folder)
        draft = _Draft(drafting, _storage(f"{name}, draft", config, drafting, device))
        planned = _Both(storage, draft)
        # Beyond what the draft network was made for it would guess nonsense.
        network = replace(network, max_context=min(network.max_context, drafting.config.max_context))
    kept = [(storage, checkpoint.config)] + ([(draft.storage, draft.checkpoint.config)] if draft else [])
    plan = _plan(name, config, network, device, planned, rank, _block_tokens(device, kept))
    logger.info("model %r: %s, %s", name, storage.name, plan)
    # The ranks' sums between the layers are not captured.
    has_graphs = device.type == "cuda" and config.cuda_graphs is not False and rank is None
    is_compiled = has_graphs and config.cuda_graphs == "compiled"
    if is_compiled and find_spec("triton") is None:
        raise SetupError(
            f"model {name!r} asks for cuda_graphs: compiled, and there is no triton to compile with; install it, or "
            "set cuda_graphs: true"
        )
    return OpenModel(
        name=name,
        checkpoint=checkpoint,
        device=device,
        storage=storage,
        plan=plan,
        rank=rank,
        draft=draft,
        static_rows=config.max_sequences if has_graphs else 0,
        compiler="inductor" if is_compiled else None,
    )


def _opened(name: str, key: str, folder: Path) -> Checkpoint:
    try:
        return open_checkpoint(folder)
    except CheckpointError as error:
        raise CheckpointError(f"model {name!r}, {key}: {error}") from None


def _device(name: str, asked: str, rank: Rank | None) -> torch.device:
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if asked == "auto":
            logger.info("model %r: device auto is the CPU, for torch %s sees no GPU", name, torch.__version__)
            return torch.device("cpu")
        cause = "is built without CUDA" if torch.version.cuda is None else "finds no GPU it can use"
        raise SetupError(
            f"model {name!r} asks for device {asked!r}, and torch {torch.__version__} {cause}; "
            "set device: cpu or auto, or install a CUDA build of torch on a machine with a GPU"
        )
    device = torch.device(f"cuda:{rank.number if rank else 0}" if asked in ("auto", "cuda") else asked)
    count = torch.cuda.device_count()
    if rank is not None and rank.count > count:
        raise SetupError(
            f"model {name!r} asks for tensor_parallel {rank.count}; this machine has {count} GPUs, and each rank needs "
            "one; set less, or device: cpu"
        )
    if device.index >= count:
        last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
        raise SetupError(f"model {name!r} asks for device {asked!r}; this machine has {last}")
    logger.info("model %r: device %s is %s", name, asked, torch.cuda.get_device_name(device))
    return device


def _storage(name: str, config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> Storage:
    """Settle what the weights are kept as, and so what runs them."""
    asked: str = config.dtype
    if asked == "auto" and checkpoint.rounding is not None:
        asked = checkpoint.rounding
    if asked in KINDS and config.tensor_parallel > 1:
        raise SetupError(
            f"model {name!r} asks for dtype {asked}, which is for a whole network, and tensor_parallel splits it; "
            "set another dtype, or tensor_parallel: 1"
        )
    if device.type != "cpu":
        if config.kernels == "compiled":
            raise SetupError(f"model {name!r} asks for kernels compiled, which are for device cpu; it runs on {device}")
        if asked == "float8":
            _check_float8(name, device)
        return _torch_storage(asked, _gpu_dtype(device))
    cause = _no_kernels(config, asked, checkpoint)
    if cause is None:
        is_half = checkpoint.dtype in _HALVES
        # float16 holds what a 16-bit checkpoint has, and halves what a token must read.
        kind = _chosen(name, checkpoint, "float16", compiled=True) if asked == "auto" else asked
        return NativeStorage(kind, checkpoint.dtype if is_half else torch.float32)
    if config.kernels == "compiled":
        raise SetupError(
            f"model {name!r} asks for kernels compiled, and there are none for it: {cause}; "
            "mend that, or set dtype: auto and kernels: auto"
        )
    if config.kernels == "auto":
        logger.info("model %r: runs on plain torch, for there are no compiled kernels: %s", name, cause)
    half = str(checkpoint.dtype).removeprefix("torch.")
    return _torch_storage(_chosen(name, checkpoint, half, compiled=False) if asked == "auto" else asked, torch.float32)


def _chosen(name: str, checkpoint: Checkpoint, half: str, *, compiled: bool) -> str:
    """The type for a CPU's weights: float32, or for a 16-bit checkpoint ``half``, unless that is slower here."""
    if checkpoint.dtype not in _HALVES:
        return "float32"
    found, measured = fastest_type(half, "float32", compiled=compiled)
    logger.info("model %r: weights in %s, for on this CPU a matrix takes %s", name, found, measured)
    return found


def _torch_storage(asked: str, default: torch.dtype) -> TorchStorage:
    if asked in KINDS:
        return TorchStorage(default, asked)
    return TorchStorage(default if asked == "auto" else getattr(torch, asked))


def _no_kernels(config: ModelConfig, dtype: str, checkpoint: Checkpoint) -> str | None:
    """Why the compiled kernels cannot run this model; None where they can."""
    if config.tensor_parallel > 1:
        return "they run a whole network, and tensor_parallel splits it"
    if config.kernels == "plain":
        return "the distribution says kernels: plain"
    if dtype == "bfloat16":
        return "they have no bfloat16; float16 holds the same weights"
    if dtype == "float8":
        return "they have no float8; int8 takes as much memory"
    if not supports(checkpoint.config):
        return f"they have no heads wider than {WIDEST_HEAD}; this checkpoint's are {checkpoint.config.head_dim}"
    try:
        library()
    except KernelsUnavailableError as error:
        return str(error)
    return None


def _block_tokens(device: torch.device, networks: Iterable[tuple[Storage, LlamaConfig]]) -> int:
    """How many tokens a block of the cache holds, which networks that run side by side share."""
    for storage, network in networks:
        if isinstance(storage, TorchStorage) and has_flash(device, storage.dtype, network.head_dim):
            return FLASH_BLOCK_TOKENS
    return BLOCK_TOKENS


def _gpu_dtype(device: torch.device) -> torch.dtype:
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _check_float8(name: str, device: torch.device) -> None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        raise SetupError(
            f"model {name!r} asks for dtype float8, which takes a GPU of compute capability "
            f"{_FLOAT8_CAPABILITY[0]}.{_FLOAT8_CAPABILITY[1]} or more; {device} has {capability[0]}.{capability[1]}; "
            "set dtype: int8"
        )


def _runner(opened: OpenModel, checkpoint: Checkpoint, storage: Storage, rank: Rank | None) -> Runner:
    plan = opened.plan
    if isinstance(storage, NativeStorage):
        model = load_model(checkpoint, device=opened.device, dtype=storage.table_dtype)
        try:
            return NativeRunner(model, kind=storage.kind, blocks=plan.blocks, context=plan.context)
        except ValueError as error:
            raise SetupError(f"model {opened.name!r}: {error}") from error
    assert isinstance(storage, TorchStorage)
    model = load_model(checkpoint, device=opened.device, dtype=storage.dtype, rank=rank, rounding=storage.rounding)
    return TorchRunner(
        model,
        blocks=plan.blocks,
        block_tokens=plan.block_tokens,
        rank=rank,
        static_rows=opened.static_rows,
        context=plan.context,
        compiler=opened.compiler,
    )


def _check_split(name: str, network: LlamaConfig, rank: Rank) -> None:
    possible = possible_ranks(network, most=64)
    if rank.count not in possible:
        raise SetupError(
            f"model {name!r}: tensor_parallel {rank.count} does not divide its {network.n_heads} heads, "
            f"{network.n_kv_heads} key/value heads, {network.ffn_dim} inner values and {network.vocab_size} tokens; "
            f"possible: {', '.join(map(str, possible))}"
        )


def _plan(
    name: str,
    config: ModelConfig,
    network: LlamaConfig,
    device: torch.device,
    storage: Storage,
    rank: Rank | None,
    block_tokens: int,
) -> MemoryPlan:
    """The memory plan of the model, or of its rank's part, with cache and context settled."""
    free = available_memory(device)
    if rank is not None:
        network = network.shard(rank.count)
        free //= rank.count if device.type == "cpu" else 1  # ranks share the machine's memory
    if config.context_tokens is not None and config.context_tokens > network.max_context:
        raise SetupError(
            f"model {name!r}: context_tokens is {config.context_tokens}, and the checkpoint was made for "
            f"{network.max_context} at most"
        )
    plan = memory_plan(
        network,
        storage,
        device,
        available_bytes=free,
        share=_SHARE[device.type],
        max_sequences=config.max_sequences,
        context_tokens=config.context_tokens,
        cache_tokens=config.cache_tokens,
        block_tokens=block_tokens,
    )
    if not plan.fits:
        raise SetupError(
            f"model {name!r} does not fit the memory: {plan}; set less context_tokens or cache_tokens, a smaller "
            "dtype, or another device"
        )
    if plan.context < network.max_context and config.context_tokens is None:
        logger.warning(
            "model %r: the context is %d of the %d tokens that it was made for; more do not fit the cache",
            name, plan.context, network.max_context,
        )  # fmt: skip
    return plan
