"""draftsmith sweep: a search for the settings that draft best, kept in an Optuna study.

A trial is one run of draftsmith train, in a folder named after what it is. Each value is drawn from (seed, trial, key)
and from the trials that ended before, so a study that was killed goes on as if it had not been: a trial that was under
way keeps its number, its values and its checkpoint.
"""

from __future__ import annotations

import dataclasses
import shlex
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, open_dict

from draftsmith import artifacts, claims, config, prepare, room, shown, train
from draftsmith.data.prompts import PromptsConfig
from draftsmith.errors import ConfigError, DataError, Diverged, DraftsmithError, NumericsError, OutOfMemory
from draftsmith.reporting import sweep as report
from draftsmith.searching import Judge, PrunerConfig, Searched, SweepConfig, same_data, watched
from draftsmith.training import processes

if TYPE_CHECKING:
    import optuna

    from draftsmith.decoding.referee import DecodingConfig

NOT_THE_STUDY = ("trials", "threads", "out")  # with others of these it is the same study
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}


@dataclasses.dataclass
class Sweep:
    """A study and what its trials share."""

    own: SweepConfig
    run_dir: Path
    study: optuna.Study
    judge: Judge

    def next(self) -> optuna.trial.Trial | None:
        """The trial that a killed process left, else a new one, else None: there are enough."""
        import optuna

        trials = self.study.get_trials(deepcopy=False)
        for left in trials:
            if left.state is optuna.trial.TrialState.RUNNING:  # nobody's: this process holds the folder
                return optuna.trial.Trial(self.study, left._trial_id)
        return self.study.ask() if len(trials) < self.own.trials else None

    def proposed(self, trial: optuna.trial.Trial) -> tuple[str, dict[str, Any]]:
        """The trial's head, and its value of every key that is searched of that head."""

        def draw(key: str, searched: Searched) -> Any:
            seed = int(artifacts.fingerprint([self.own.seed, trial.number, key])[:8], 16)
            self.study.sampler = sampler(self.own, seed)
            return searched.suggest(trial, key)

        several = len(self.own.compare) > 1
        head = draw("head", Searched(choices=list(self.own.compare))) if several else self.own.compare[0]
        return head, {key: draw(key, searched) for key, searched in self.own.searched(head).items()}

    def try_out(self, trial: optuna.trial.Trial) -> None:
        """Trains and judges a trial, from wherever it stopped, and writes down what became of it."""
        from draftsmith.training.pruning import Pruned

        head, values = self.proposed(trial)
        began = time.monotonic() - trial.user_attrs.get("seconds", 0.0)

        def note_time() -> None:
            trial.set_user_attr("seconds", time.monotonic() - began)

        for name, is_what in (("head", head), ("params", values)):
            trial.set_user_attr(name, is_what)
        state, value, reason = "FAIL", None, None
        told = " ".join([head, *(f"{key}={report.short(v)}" for key, v in values.items())])
        prepare.say(f"\ntrial {trial.number} ({trial.number + 1} of {self.own.trials}): {told}")
        try:
            value, state = self._value(trial, head, values, note_time), "COMPLETE"
        except Pruned as e:
            state, reason = "PRUNED", str(e)
        except (Diverged, OutOfMemory) as e:  # too high a learning rate, as a rule; or too large for this machine
            reason = str(e)
        except ConfigError as e:  # values that do not go together
            if prepare.is_held(self._folder(trial)):
                raise
            reason = str(e)
        except DraftsmithError:  # the disk, a signal: nothing that another trial would be spared
            raise
        except Exception as e:
            reason = f"{type(e).__name__}: {shown.clean(' '.join(str(e).split()))[:300]}"
        finally:
            note_time()
        self._tell(trial, state, value, reason)

    def _folder(self, trial: optuna.trial.Trial) -> Path:
        return self.run_dir / trial.user_attrs.get("folder", "nothing")

    def _value(
        self, trial: optuna.trial.Trial, head: str, values: Mapping[str, Any], note_time: Callable[[], None]
    ) -> float:
        """The objective of this trial, after its training. note_time: called at every estimate."""
        from draftsmith.training.pruning import Telling, estimates

        cfg = self.own.training(head, values, self.study.study_name)
        trial.set_user_attr("folder", f"{head}-{artifacts.fingerprint(config.identity(cfg))[:8]}")
        folder, key = self._folder(trial), watched(cfg, head)
        cfg.run_dir = str(folder)
        known = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

        def tell(step: int, value: float) -> bool:
            if step not in known:
                trial.report(value, step)
                known.add(step)
                note_time()
            return trial.should_prune() and trial.number >= self.own.pruner.startup

        train.run(cfg, more=[Telling(folder / "metrics.jsonl", key, tell)])
        found = estimates(folder / "metrics.jsonl", key)
        for step, value in found:  # of a run that was complete before
            tell(step, value)
        if self.own.objective == "estimated":
            if not found:
                raise ConfigError(f"objective=estimated: {head} has no {key}; choose measured")
            return found[-1][1]
        twins = [t for t in self.records() if t["folder"] == folder.name and t["state"] == "complete"]
        return twins[0]["value"] if twins else self.judge.tokens_per_step(cfg, folder)

    def _tell(self, trial: optuna.trial.Trial, state: str, value: float | None, reason: str | None) -> None:
        import optuna

        trial.set_user_attr("reason", reason)
        self.study.tell(trial, value, state=optuna.trial.TrialState[state])
        artifacts.write_json(self.run_dir / "sweep.json", self.result())
        said = f"{value:.3f} tokens per step" if value is not None else reason
        prepare.say(f"trial {trial.number}: {STATES[state]}, {said}")

    def records(self) -> list[dict[str, Any]]:
        """Every trial, by number. steps: when it was last measured; seconds: of all its parts; estimates: [step, tokens
        per step]; reason: why it was pruned or failed."""
        made = []
        for t in self.study.get_trials(deepcopy=False):
            estimates = [[step, value] for step, value in sorted(t.intermediate_values.items())]
            kept = {key: t.user_attrs.get(key) for key in ("head", "params", "seconds", "folder", "reason")}
            state = STATES[t.state.name]
            about = {"number": t.number, "state": state, "value": t.value if state == "complete" else None}
            made.append({**about, **kept, "steps": (estimates or [[0]])[-1][0], "estimates": estimates})
        return made

    def result(self) -> dict[str, Any]:
        trials = self.records()
        best = report.best(trials)
        told = None
        if best is not None:
            words = ["draftsmith", "train", *self.own.overrides(best["head"], best["params"])]
            told = {"number": best["number"], "value": best["value"], "command": shlex.join(words)}
        return {"study": self.study.study_name, "objective": self.own.objective, "best": told, "trials": trials}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Tries until the study has cfg.trials of them; returns what it writes to sweep.json."""
    own = config.typed({f.name: cfg[f.name] for f in dataclasses.fields(SweepConfig)}, SweepConfig, "sweep")
    judge = Judge(config.typed(cfg.selection, PromptsConfig, "selection"), _decoding(cfg))
    if processes.place().world > 1:
        raise ConfigError("sweep: is one process; start it without a launcher")
    own.check()
    prepare.MachineConfig(own.threads).apply()
    same = cfg.copy()
    with open_dict(same):
        for key in NOT_THE_STUDY:
            del same[key]
    run_dir = config.run_dir(same, "sweep")
    room.ready(run_dir, "run_dir")
    with prepare.held(run_dir):
        claims.claim(same, run_dir)
        sweep = Sweep(own, run_dir, opened(run_dir / "study.db", run_dir.name, own.pruner), judge)
        while (trial := sweep.next()) is not None:
            sweep.try_out(trial)
        result = sweep.result()
        artifacts.write_json(run_dir / "sweep.json", result)
    done = [t for t in result["trials"] if t["state"] == "complete"]
    same_data([run_dir / t["folder"] for t in done])
    prepare.say(f"\n{report.text(result)}\n-> {run_dir / 'sweep.json'}")
    prepare.say(report.write(Path(own.out) if own.out else run_dir, result, ("svg", "png")))
    if result["best"] is None:
        reasons = [t["reason"] for t in result["trials"] if t["state"] == "failed"]
        raise NumericsError(f"sweep: no trial was complete; the last reason: {(reasons or ['all were pruned'])[-1]}")
    folder = run_dir / result["trials"][result["best"]["number"]]["folder"]
    prepare.say(f"best: trial {result['best']['number']}, {folder}; again from nothing:\n  {result['best']['command']}")
    return result


def _decoding(cfg: DictConfig) -> DecodingConfig:
    from draftsmith.decoding.referee import DecodingConfig

    return config.typed(cfg.decoding, DecodingConfig, "decoding")


def sampler(own: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if own.sampler.kind == "random":
        return optuna.samplers.RandomSampler(seed)
    how: dict[str, Any] = {"multivariate": False, "constant_liar": False}  # each key by itself: not all heads have it
    return optuna.samplers.TPESampler(n_startup_trials=own.sampler.startup, seed=seed, **how)


def pruner(own: PrunerConfig) -> optuna.pruners.BasePruner:
    import optuna

    if own.kind == "halving":
        how: dict[str, Any] = {"min_resource": own.warmup, "reduction_factor": own.factor}
        return optuna.pruners.SuccessiveHalvingPruner(**how)
    if own.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=own.warmup)
    return optuna.pruners.NopPruner()


def opened(path: Path, name: str, pruned: PrunerConfig) -> optuna.Study:
    """The study in this file, which appears only when it is whole; ConfigError without Optuna, DataError for a file
    that is something else."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("sweep: needs Optuna; pip install 'draftsmith[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if not path.exists():
        with artifacts.whole(path) as temporary:
            temporary.unlink(missing_ok=True)  # of a killed process that had this one's number
            storage = optuna.storages.RDBStorage(f"sqlite:///{temporary.resolve()}")
            optuna.create_study(storage=storage, study_name=name, direction="maximize")
            storage.remove_session()
            storage.engine.dispose()
    try:
        with sqlite3.connect(path) as found:
            sound = found.execute("pragma quick_check").fetchone() == ("ok",)
            studies = found.execute("select study_name from studies").fetchall() if sound else []
        found.close()
    except sqlite3.DatabaseError:
        studies = []
    if len(studies) != 1:
        raise DataError(f"{path}: holds no study of ours, or is damaged; bring it back or choose another run_dir")
    how = {"connect_args": {"timeout": 60}}  # whoever looks at it meanwhile may hold it for a moment
    kept = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs=how)
    return optuna.load_study(study_name=studies[0][0], storage=kept, pruner=pruner(pruned))


def main() -> None:
    config.command("sweep", run)


if __name__ == "__main__":
    main()
