"""Trackers of experiments (W&B, MLflow, TensorBoard, CSV) beside a training, through Lightning's loggers.

metrics.jsonl is what counts. A tracker gets its lines through a queue, in a thread of its own: one that is slow, gone
or broken costs the training nothing, and is told of in one line. A resumed run goes on under the id that its
checkpoint kept; what a tracker has of steps that were done again is overwritten by their last value, as `step` is
the axis of every metric.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from draftsmith import artifacts
from draftsmith.errors import ConfigError, DataError
from draftsmith.shown import clean
from draftsmith.training.settings import LoggerConfig

FILE = "tracker.json"  # in the run directory, for whoever goes on after the training
Work = Callable[[Any], None]


class Tracker:
    """One run's tracker. opened(config, run_dir, shown, kept, again): makes a Lightning logger, in the thread; again:
    what it was told before is told once more. shown: the configuration as others may see it. kept: kind and id, which
    checkpoints keep. Its methods never raise and never wait, but `close`, which waits config.patience seconds."""

    def __init__(
        self, config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any], opened: Callable[..., Any] | None = None
    ) -> None:
        self.config, self.run_dir, self.shown = config, run_dir, shown
        self.kept: dict[str, str] = {}
        self._open = opened or OPENERS[config.kind]
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failed = False

    def begin(self, kept: Mapping[str, str], start: int, *, again: bool = True) -> None:
        """Opens the tracker; kept: of the checkpoint that the run goes on from, {} for none. start: steps done. again:
        it is given the lines of those steps once more: whoever was killed may not have passed them on."""
        last = told(self.run_dir)["kept"]  # which may know what a checkpoint was too early for
        known = {**last, **kept} if not kept or last.get("id") == kept.get("id") else dict(kept)
        same = known.get("kind") == self.config.kind
        new = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)  # a W&B sweep's agent has named the run
        self.kept = known if same else {"kind": self.config.kind, "id": new}
        lines = list(_earlier(self.run_dir, start)) if again else []
        self._thread = threading.Thread(target=partial(self._serve, lines), name="tracker", daemon=True)
        self._thread.start()

    def tell(self, work: Work) -> None:
        """work(logger), some time."""
        self._work.put(work)

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        self.tell(lambda logger: _log(logger, dict(line)))

    def close(self, *, failed: bool = False) -> None:
        """failed: how the tracker shall call the run's end."""
        if self._thread is None:
            return
        self._failed = failed
        self._work.put(None)
        self._thread.join(self.config.patience)
        if self._thread.is_alive():
            print(
                f"warning: logger: {self.config.kind} is still busy after {self.config.patience:g} s and is left alone;"
                f" {self.run_dir / 'metrics.jsonl'} has every line",
                flush=True,
            )
        self._thread = None

    def _serve(self, earlier: list[dict[str, Any]]) -> None:
        try:
            logger = self._open(self.config, self.run_dir, self.shown, self.kept, bool(earlier))
            how = {"logger": dataclasses.asdict(self.config), "shown": self.shown}
            artifacts.write_json(self.run_dir / FILE, {"kept": self.kept, **how})
            for line in earlier:
                _log(logger, line)
            while (work := self._work.get()) is not None:
                work(logger)
            logger.finalize("failed" if self._failed else "success")
            if self.config.kind == "wandb":
                logger.experiment.finish(exit_code=int(self._failed))
        except Exception as e:  # whatever it was, the training does not end by it
            said = clean(" ".join(str(e).split()))[:200]
            print(
                f"warning: logger: {self.config.kind} ended by {type(e).__name__}: {said}; training goes on, and"
                f" {self.run_dir / 'metrics.jsonl'} has every line",
                flush=True,
            )


def of(config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any]) -> Tracker | None:
    return None if config.kind == "none" else Tracker(config, run_dir, shown)


def told(run_dir: Path) -> dict[str, Any]:
    """What the run's tracker was: kept (kind and id), logger, shown; {} where there was none."""
    path = run_dir / FILE
    try:
        found = artifacts.read_json(path) if path.exists() else {"kept": {}}
    except (DataError, OSError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("kept"), dict):
        print(f"warning: logger: {path} does not tell kind and id of a tracker; there will be a new run", flush=True)
        return {"kept": {}}
    return found


def _log(logger: Any, line: dict[str, Any]) -> None:
    """W&B keeps `step` as one of the metrics, on which the others are drawn: its own counter refuses to go back."""
    if hasattr(logger.experiment, "define_metric"):
        logger.experiment.log(line)
    else:
        step = line.pop("step")
        logger.log_metrics(line, step=step)
        logger.save()


def _earlier(run_dir: Path, start: int) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl up to step `start`."""
    path = run_dir / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["step"] <= start:
            yield line


def _wandb(config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any], kept: dict[str, str], again: bool) -> Any:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    mode: Any = "offline" if config.offline else os.environ.get("WANDB_MODE")
    if mode is None and not wandb.api.api_key:
        print("note: logger: W&B has no key (WANDB_API_KEY, wandb login), so it writes offline", flush=True)
        mode = "offline"
    # Nothing of the command line, the environment, the machine or the code: a secret may stand in any of them.
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        finish_timeout=max(1.0, config.patience),
    )
    os.environ.setdefault("WANDB_SILENT", "true")  # what is said before the settings are read
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        name=config.name or run_dir.name,
        group=config.group or shown.get("experiment"),
        tags=config.tags,
        config=dict(shown),
        dir=str(run_dir),
        id=kept["id"],
        mode=mode,
        resume=None if mode == "offline" else "allow",
        reinit="create_new",
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = run.url or f"offline; wandb sync {Path(run.dir).parent}"
    print(f"logger: W&B run {run.id} ({where})", flush=True)
    return WandbLogger(experiment=run)


def _csv(config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any], kept: dict[str, str], again: bool) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(run_dir, name="csv", version="")
    logger.log_hyperparams(dict(shown))
    return logger


def _tensorboard(
    config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any], kept: dict[str, str], again: bool
) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(run_dir, name="tensorboard", version="", purge_step=0 if again else None)
    logger.log_hyperparams(dict(shown))
    return logger


def _mlflow(config: LoggerConfig, run_dir: Path, shown: Mapping[str, Any], kept: dict[str, str], again: bool) -> Any:
    from lightning.pytorch.loggers import MLFlowLogger

    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for it before it writes plain files
    logger = MLFlowLogger(
        experiment_name=config.project,
        run_name=config.name or run_dir.name,
        tracking_uri=config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"file:{(run_dir / 'mlruns').resolve()}",
        tags={**dict.fromkeys(config.tags, ""), **({"group": config.group} if config.group else {})},
        run_id=kept.get("run"),
    )
    if "run" not in kept:
        logger.log_hyperparams(dict(shown))
    kept["run"] = str(logger.run_id)  # MLflow chooses it
    return logger


OPENERS: dict[str, Callable[..., Any]] = {
    "wandb": _wandb,
    "csv": _csv,
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
}


def summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The part of evaluation.json that a table of runs is sorted by."""
    found: dict[str, Any] = {}
    for name, head in evaluation["heads"].items():
        for key in ("tokens_per_step", "accepted_drafts_per_step", "speedup", "tokens_per_second", "parameters"):
            found[f"{name}/{key}"] = head.get(key)
        proof = head.get("lossless")
        if proof:
            found[f"{name}/lossless"] = bool(proof["ok"])
            found[f"{name}/mismatches"], found[f"{name}/near_ties"] = proof["mismatches"], proof["near_ties"]
    return {key: value for key, value in found.items() if value is not None}


COLOURS = {"accepted": "#009E73", "own": "#0072B2", "rejected": "#D55E00"}


def coloured(sample: Mapping[str, Any]) -> str:
    """One decoded text as HTML: accepted drafts green, the base's own tokens blue, rejected drafts struck out."""

    def told(kind: str, piece: str) -> str:
        struck = ";text-decoration:line-through;opacity:0.7" if kind == "rejected" else ""
        return f'<span title="{kind}" style="color:{COLOURS[kind]}{struck}">{html.escape(piece)}</span>'

    parts: list[str] = []
    for step in sample["steps"]:
        parts += [told("accepted", piece) for piece in step["accepted"]]
        parts += [told("rejected", piece) for piece in step["rejected"]]
        parts += [told("own", step["own"])] if step["own"] else []
    return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</div>'


def conclude(run_dir: Path, evaluation: Mapping[str, Any]) -> None:
    """Gives a run's tracker, if it has one, the results: the summary and, where it can show them, texts by who wrote
    what."""
    known = told(run_dir)
    if not known["kept"]:
        return
    try:
        config = LoggerConfig(**known["logger"])
        tracker = Tracker(config, run_dir, known["shown"])
    except (ConfigError, KeyError, TypeError) as e:  # its package is not here, or another version wrote the file
        print(f"warning: logger: {clean(str(e))}; the tracker is not told", flush=True)
        return
    last = max((line["step"] for line in _earlier(run_dir, 1 << 62)), default=0)
    tracker.begin({}, last, again=config.kind == "csv")  # it begins its file anew
    results = summary(evaluation)

    def work(logger: Any) -> None:
        if config.kind == "wandb":
            logger.experiment.log({"step": last, "samples": _table(evaluation)})
            logger.experiment.summary.update(results)
        else:
            logger.log_metrics({k: float(v) for k, v in results.items()}, step=last)
            logger.save()

    tracker.tell(work)
    tracker.close()


def _table(evaluation: Mapping[str, Any]) -> Any:
    import wandb

    table = wandb.Table(columns=["head", "prompt", "answer", "accepted", "steps"])
    for name, head in evaluation["heads"].items():
        for sample in head.get("samples", []):
            accepted = sum(len(step["accepted"]) for step in sample["steps"])
            steps = len(sample["steps"]) - 1  # the first token is prefill's
            table.add_data(name, sample["prompt"], wandb.Html(coloured(sample)), accepted, steps)
    return table


def lineage(tracker: Tracker, read: Mapping[str, str], facts: Mapping[str, Any], heads: Mapping[str, Path]) -> None:
    """rows -> store -> heads, as W&B's artifacts. read: kind -> sha256 of what the heads learned from, in the order in
    which each was made from the one before. facts: told of all of it. heads: name -> folder of the native export."""
    if tracker.config.kind != "wandb":
        return

    def work(logger: Any) -> None:
        import wandb

        run, before = logger.experiment, ""
        for kind, sha256 in read.items():
            metadata = {**facts, "sha256": sha256, "made_from": before}
            artifact = wandb.Artifact(f"{kind}-{sha256[:12]}", kind, metadata=metadata)
            with artifact.new_file(f"{kind}.json") as f:
                f.write(json.dumps(metadata, indent=2, default=str))
            # use_artifact() by its other name: that one refuses to work offline, though the file can tell it
            run._log_artifact(artifact, use_after_commit=True)
            before = artifact.name
        for name, folder in heads.items():
            files = artifacts.read_json(folder / artifacts.MANIFEST)["files"]
            artifact = wandb.Artifact(f"head-{name}", "head", metadata={"made_from": before, "files": files})
            for path in sorted(folder.iterdir()):
                if path.is_file() and (tracker.config.weights or path.suffix != ".safetensors"):
                    artifact.add_file(str(path))
            run.log_artifact(artifact)

    tracker.tell(work)
