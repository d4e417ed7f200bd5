"""Fine-tune an experiment: from its settings to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from .. import schemas, tracking
from ..config.experiment import Experiment
from ..config.names import named_after, safe_name
from ..data.batches import TokenizedDataset, collator, edges_of
from ..data.loading import load, settled
from ..data.rows import TextData
from ..errors import KitError
from ..kernels import cuda_graphs
from ..metrics import scores
from ..metrics.scores import compute_metrics
from ..models import inventory
from ..models.forward import evaluation_rows, forward_texts
from ..models.heads import start_head_from_class_means_
from ..models.sources import Base, find_base
from ..models.weights import save_adapter
from ..run import Run
from ..runs import card as cards
from ..system.arguments import CALLBACKS, DATA, EXPERIMENT, FLAG, FOLDER, TEXT, takes
from ..system.devices import default_device
from ..system.environment import environment
from ..system.files import (
    as_json,
    drop_partial,
    locked,
    move_aside,
    move_into_place,
    plain,
    refuse_links,
    saving,
    write_json,
    write_text,
)
from ..system.manifest import NAME, OF_A_RUN, of
from . import checkpoints
from .arguments import arguments_of_run
from .prepare import Prepared, prepare
from .summary import _readable_memory, _summary
from .trainer import KitTrainer

logger = logging.getLogger(__name__)


@takes(experiment=EXPERIMENT, data=DATA, out=FOLDER, name=TEXT, resume=FLAG, progress=FLAG, callbacks=CALLBACKS)
def finetune(
    experiment: Experiment,
    *,
    data: TextData | None = None,
    out: str | Path = "runs",
    name: str | None = None,
    resume: bool = True,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Fine-tune an experiment's model and save everything about it in a run folder.

    Args:
        experiment: The model, the data and the settings.
        data: Data to use instead of what `experiment.data` names; from `qlora_kit.text_classification`. The other
            settings of the experiment's data section still hold; a conflict is refused (see `qlora_kit.data.settled`).
        out: Folder in which the run folder is made.
        name: Name of the run folder; by default the experiment's name and the seed.
        resume: If the same run was interrupted, continue from its newest undamaged checkpoint; if it is finished,
            return it as it is. Any other run in the folder is moved to `NAME-DATE`, never overwritten.
        progress: Show progress bars.
        callbacks: More callbacks for transformers' Trainer.

    Returns:
        The run, ready for `predict` and `qlora_kit.evaluate`.

    Raises:
        KitError: For bad input, and a tracker whose package is missing, before anything is written; when the disk is
            full; when another process is training the same run.
        TrainingError: When the loss is no longer finite or the GPU has too little memory.
    """
    started = time.perf_counter()
    spec = experiment.training
    tracking.refuse_absent(experiment.tracking)
    if data is None:
        data = load(experiment.data)
    else:
        experiment = with_data(experiment, data)
    folder = Path(out) / safe_name("run", name or f"{experiment.name}_seed{spec.seed}")
    base = find_base(experiment.model)
    refuse_links(folder)
    with locked(folder):
        finished = _settle(folder, experiment, data, base, resume)
        if finished is not None:
            logger.warning("%s is finished already; it is returned as it is.", folder)
            return finished
        with _readable_memory(experiment):
            prepared = prepare(experiment, data)
            if (whole := inventory.take(prepared.model, experiment).warning(experiment)) is not None:
                logger.warning("%s.", whole)
            base = find_base(experiment.model)  # look again: a hub model may be in the cache only now
            _begin(folder, experiment, data, base)
            with (
                tracking.opened(experiment, Path(out), folder.name) as tracked_run,
                tracking.reporting(experiment, Path(out), folder.name, tracked_run) as trackers,
            ):
                trainer = _trainer(experiment, prepared, data, folder, trackers, progress)
                tracking.guard_callback(tracked_run, trainer)
                tracking.guard_others(trainer)
                for callback in callbacks:
                    trainer.add_callback(callback)
                train_started = time.perf_counter()
                checkpoint = _train(trainer, experiment, prepared, data, folder, progress)
                train_seconds = time.perf_counter() - train_started
                # With another prefix W&B would show these as test scores.
                validation = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")  # type: ignore[arg-type]
                logits, rows = np.asarray(validation.predictions), data.validation
                metrics = scores.metrics(logits, np.asarray(rows.labels))
                training = _summary(
                    trainer, experiment, data, metrics, train_seconds, time.perf_counter() - started, checkpoint
                )
                _finish(folder, experiment, data, base, prepared, training)
                # Log more only once the run is complete: W&B can fail or take long.
                texts = rows.texts if tracking.may_quote(experiment) else None
                tracking.log_validation(tracked_run, logits, rows.labels, texts, data.label_names)
    run = Run(folder)
    logger.info("%s", run.verdict)
    return run


def with_data(experiment: Experiment, data: TextData) -> Experiment:
    """Return the experiment on other data; in a preset's name, `banking77` becomes the data's name (`named_after`).

    Args:
        experiment: The experiment. The settings of its data section still hold (see `data.settled`).
        data: The data to train on.

    Raises:
        KitError: When the section and the data disagree.
    """
    name = experiment.name
    if experiment.data.name == "banking77":
        name = named_after(name, data.spec.name)
    return experiment.override({"name": name, "data": plain(settled(experiment.data, data))})


def _settle(folder: Path, experiment: Experiment, data: TextData, base: Base, resume: bool) -> Run | None:
    """Handle an existing run folder: return a finished run, keep an interrupted one, move any other aside."""
    if not (folder / "experiment.yaml").is_file():
        return None
    same = False
    with contextlib.suppress(KitError):
        checksums = schemas.read(folder / "environment.json", "environment.json")["checksums"]
        same = (
            resume
            and _same(Experiment.from_yaml(folder / "experiment.yaml"), experiment)
            and checksums["data"] == data.checksum
            # The checksum is unknown if the base is or was not in the hub's cache.
            and (base.checksum is None or checksums["base"] in (None, base.checksum))
            and (base.configuration is None or checksums.get("base_config") in (None, base.configuration))
        )
    if same:
        if not (folder / "training.json").is_file():
            return None
        run = Run(folder)
        _drop_checkpoints(folder, experiment)  # the run may have been interrupted just before this step
        return run
    contents = [item for item in folder.iterdir() if item.name != ".lock"]
    aside = move_aside(folder / "experiment.yaml")
    target = folder.with_name(f"{folder.name}-{aside.name.removeprefix('experiment.yaml-')}")
    target.mkdir()
    for item in contents:
        source = aside if item.name == "experiment.yaml" else item
        source.rename(target / item.name)
    logger.warning("%s held another run; it is now %s.", folder, target)
    return None


def _same(first: Experiment, second: Experiment) -> bool:
    """Return whether two experiments give the same result: all settings but tracking are equal."""
    one, two = first.to_dict(), second.to_dict()
    for tree in (one, two):
        tree.pop("tracking")
    return one == two


def _begin(folder: Path, experiment: Experiment, data: TextData, base: Base) -> None:
    if not (folder / "experiment.yaml").is_file():
        environment = _environment(None, data, base)
        write_json(folder / "environment.json", environment)
        if experiment.data.name != "banking77":  # the user's file may move or change; the run folder must be enough
            data.save(folder / "data")
        write_text(folder / "experiment.yaml", experiment.to_yaml())


def _environment(device: torch.device | None, data: TextData, base: Base) -> dict[str, Any]:
    return environment(
        device,
        data_checksum=data.checksum,
        base_checksum=base.checksum,
        base_config_checksum=base.configuration,
    )


def _trainer(
    experiment: Experiment, prepared: Prepared, data: TextData, folder: Path, trackers: Sequence[str], progress: bool
) -> KitTrainer:
    return KitTrainer(
        spec=experiment.training,
        lengths=[len(row) for row in prepared.tokens["train"]],
        model=prepared.model,
        args=arguments_of_run(
            experiment, folder, device=prepared.device, rows=len(data.train), trackers=trackers, progress=progress
        ),
        **trainer_data(experiment, prepared.tokenizer, data, prepared.tokens),
    )


def _train(
    trainer: KitTrainer, experiment: Experiment, prepared: Prepared, data: TextData, folder: Path, progress: bool
) -> Path | None:
    """Train from the newest undamaged checkpoint, or from the start; return that checkpoint or None."""
    checkpoint = checkpoints.newest_whole(folder / "checkpoints")
    if checkpoint is not None:
        logger.warning("Going on from %s.", checkpoint)
    elif experiment.model.head_init == "class_means":
        start_head(experiment, prepared.model, prepared.tokenizer, data, prepared.device, prepared.precision, progress)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return checkpoint


def trainer_data(
    experiment: Experiment, tokenizer: Any, data: TextData, tokens: Mapping[str, list[list[int]]]
) -> dict[str, Any]:
    """Return the Trainer's arguments for the data: data sets, collator and metrics."""
    return {
        "train_dataset": TokenizedDataset(tokens["train"], data.train.labels),
        "eval_dataset": TokenizedDataset(tokens["validation"], data.validation.labels),
        "data_collator": collator(
            tokenizer.pad_token_id,
            "max_length" if experiment.training.padding == "max_length" else "longest",
            experiment.data.max_length,
            side=tokenizer.padding_side,
            edges=edges_of(default_device()),
        ),
        "compute_metrics": lambda predicted: compute_metrics(predicted.predictions, predicted.label_ids),
    }


def start_head(
    experiment: Experiment,
    model: torch.nn.Module,
    tokenizer: Any,
    data: TextData,
    device: torch.device,
    precision: str,
    progress: bool,
) -> None:
    """Initialize a cosine head with the class means of the untrained model's states, in place (`model.head_init`).

    Args:
        experiment: The model's experiment.
        model: As `models.build` made it.
        tokenizer: Its tokenizer.
        data: Its training rows are run through the model once.
        device: Where the model is.
        precision: `fp32`, `fp16` or `bf16`.
        progress: Show a progress bar.
    """
    states = forward_texts(
        model,
        tokenizer,
        data.train.texts,
        device=device,
        precision=precision,
        max_length=experiment.data.max_length,
        batch_size=evaluation_rows(experiment, device.type),
        states=True,
        progress="class means" if progress else None,
    )
    cuda_graphs.forget(model)  # the graphs of these forward passes: training captures its own
    start_head_from_class_means_(model, states, data.train.labels)
    model.train()


def _drop_checkpoints(folder: Path, experiment: Experiment) -> None:
    if experiment.training.checkpoints == "remove":
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _finish(
    folder: Path, experiment: Experiment, data: TextData, base: Base, prepared: Prepared, training: dict[str, Any]
) -> None:
    """Write the run's results. `training.json` comes last: a run that has it is complete."""
    with saving(folder):
        drop_partial(folder)
        for part, save in (
            ("adapter", lambda target: save_adapter(prepared.model, target)),
            ("tokenizer", lambda target: prepared.tokenizer.save_pretrained(str(target))),
        ):
            aside = folder / f".{part}"
            for stale in (aside, folder / part):
                shutil.rmtree(stale, ignore_errors=True)
            save(aside)
            move_into_place(aside, folder / part)
        environment = _environment(prepared.device, data, base)
        write_json(folder / "environment.json", environment)
        card = cards.model_card(experiment, plain(training), base.licence, environment=environment)
        write_text(folder / "README.md", card)
        # Write the manifest before `training.json`: a complete run without one could not be checked.
        text = as_json(training)
        sealed = of(folder, OF_A_RUN, coming={"training.json": text})
        write_json(folder / NAME, sealed)
        write_text(folder / "training.json", text)
        _drop_checkpoints(folder, experiment)
