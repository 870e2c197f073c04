"""A search for settings: trainings with different ones, of which the least validation loss is kept.

Each trial is a job folder of its own below ``trials/``, so a search that is cut off goes on where it was. A trial whose
training comes apart has lost; a job of which all have is one that failed.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llama_stack.errors import InvalidRequestError

from .plan import (
    MANIFEST_FILE,
    RESULT_FOLDER,
    TRIALS_FOLDER,
    Finished,
    Note,
    SearchSettings,
    Stopped,
    TrainingPlan,
    Trial,
    Validation,
    read_progress,
)
from .progress import Progress
from .ranks import Ranks
from .store import write_folder
from .trainer import DivergedError, Trainer, finished_result

Settings = Mapping[str, float]


def combinations(search: SearchSettings, seed: int) -> Sequence[Settings]:
    """The settings of each trial: all combinations, the last setting varying fastest, or some that are drawn."""
    varied = {name: getattr(search, name) for name in ("lr", "rank", "alpha", "batch_size")}
    varied = {name: values for name, values in varied.items() if values}
    made = [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]
    if search.method == "random":
        return random.Random(seed).sample(made, min(search.trials, len(made)))
    return made[: search.trials]


def trial_plan(plan: TrainingPlan, settings: Settings) -> TrainingPlan:
    """The plan of a trial. ``lr_min`` stays the same share of ``lr``."""
    values = plan.model_dump(mode="json", exclude={"search"})
    if "lr" in settings:
        share = plan.optimizer.lr_min / plan.optimizer.lr if plan.optimizer.lr else 0.0
        values["optimizer"] |= {"lr": settings["lr"], "lr_min": settings["lr"] * share}
    values["adapter_settings"] |= {name: settings[name] for name in ("rank", "alpha") if name in settings}
    values["training"] |= {name: settings[name] for name in ("batch_size",) if name in settings}
    return TrainingPlan.model_validate(values)


def run_search(
    plan: TrainingPlan, job: Path, progress: Progress, ranks: Ranks, is_stopping: Callable[[], bool]
) -> bool:
    """Try all settings and leave the best trial's result as the job's; returns whether it is there.

    Raises ``InvalidRequestError`` where no trial came to an end, and what ``Trainer`` raises.
    """
    assert plan.search is not None
    tried = combinations(plan.search, plan.seed)
    told = {event.number for event in read_progress(job) if isinstance(event, Trial)}
    ended: list[float] = []
    for number, settings in enumerate(tried):
        folder = job / TRIALS_FOLDER / f"{number:03}"
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            trial_plan(plan, settings).save(folder)
        ranks.meet()
        loss = _trial(folder, ranks, is_stopping)
        if loss is None:
            progress.tell(Stopped, iters=0)
            return False
        if number not in told:
            is_lost = math.isinf(loss)
            progress.tell(
                Trial,
                number=number,
                trials=len(tried),
                settings=dict(settings),
                validation_loss=None if is_lost else loss,
            )
        ended.append(loss)
    best = min(range(len(ended)), key=ended.__getitem__)
    if math.isinf(ended[best]):
        raise InvalidRequestError("every trial of the search came apart; try smaller values of lr")
    return _keep(job, best, tried, progress, ranks)


def _trial(folder: Path, ranks: Ranks, is_stopping: Callable[[], bool]) -> float | None:
    """Do a trial as far as it is not done; returns its validation loss, None where it was stopped."""
    if finished_result(folder) is None:
        progress = Progress(folder, is_first=ranks.is_first)
        try:
            if not Trainer(TrainingPlan.load(folder), folder, progress, ranks).run(is_stopping):
                return None
        except DivergedError as error:
            progress.tell(Note, text=str(error))
            return math.inf
        finally:
            progress.close()
    return [event.loss for event in read_progress(folder) if isinstance(event, Validation)][-1]


def _keep(job: Path, best: int, tried: Sequence[Settings], progress: Progress, ranks: Ranks) -> bool:
    source = job / TRIALS_FOLDER / f"{best:03}" / RESULT_FOLDER
    iters = finished_result(source.parent)
    assert iters is not None

    def fill(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST_FILE:
                shutil.copyfile(path, folder / path.name)

    if ranks.is_first:
        write_folder(job / RESULT_FOLDER, iters, fill)
    ranks.meet()
    told = ", ".join(f"{name} {value:g}" for name, value in tried[best].items())
    progress.tell(Note, text=f"kept is trial {best}: {told}")
    progress.tell(Finished, iters=iters, folder=RESULT_FOLDER)
    return True
