"""The contracts: one abstract class an API, and the schemas that travel. Knows no provider, no server and no torch."""

from .agentic_system import AgenticSystem
from .config import Config, InnerProvider, NoConfig
from .contract import Api, Operation, Parameter, Shape, contract_of, delete, get, operations, post
from .datasets import Datasets
from .inference import Inference
from .memory_banks import MemoryBanks
from .models import Models, ServedModel
from .post_training import PostTraining
from .reward_scoring import RewardScoring
from .safety import Safety
from .synthetic_data_generation import SyntheticDataGeneration

APIS: tuple[type[Api], ...] = (
    Inference,
    Safety,
    MemoryBanks,
    AgenticSystem,
    Datasets,
    PostTraining,
    RewardScoring,
    SyntheticDataGeneration,
    Models,
)
"""The contracts that the core brings: the draft's seven, and the extensions Safety and Models."""
DRAFT_APIS: tuple[type[Api], ...] = tuple(api for api in APIS if api not in (Safety, Models))
"""The draft's seven."""

__all__ = [
    "APIS",
    "DRAFT_APIS",
    "AgenticSystem",
    "Api",
    "Config",
    "Datasets",
    "Inference",
    "InnerProvider",
    "MemoryBanks",
    "Models",
    "NoConfig",
    "Operation",
    "Parameter",
    "PostTraining",
    "RewardScoring",
    "Safety",
    "ServedModel",
    "Shape",
    "SyntheticDataGeneration",
    "contract_of",
    "delete",
    "get",
    "operations",
    "post",
]
