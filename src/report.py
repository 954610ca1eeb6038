"""draftsmith report: what runs left behind, as pages for people; several runs beside one another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from draftsmith import artifacts, claims, config, prepare, room, shown
from draftsmith.errors import ConfigError, DataError
from draftsmith.reporting import report, report_compare, report_page, report_run

TELLING = ("metrics.jsonl", "evaluation.json", "provenance.json", "config.yaml")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    run_dirs: list[str] = dataclasses.field(default_factory=list)
    out: str | None = None

    def __post_init__(self) -> None:
        if len({Path(f).resolve() for f in self.run_dirs}) < len(self.run_dirs):
            raise ConfigError(f"run_dirs: {list(self.run_dirs)} names a run twice; give each once")


def run(cfg: DictConfig) -> list[Path]:
    """Writes the report of every run into its directory, and the comparison of several into cfg.out; the folders."""
    given = [cfg.run_dirs] if isinstance(cfg.run_dirs, str) else cfg.run_dirs
    settings = config.typed({"run_dirs": given, "out": cfg.out}, ReportConfig, "report")
    folders = [Path(f) for f in settings.run_dirs]
    if not folders:
        raise ConfigError("run_dirs: empty; give at least one run, as run_dirs=[runs/a,runs/b]")
    runs = [read(folder) for folder in folders]
    written = [Path(settings.out)] if len(runs) == 1 and settings.out else folders
    for folder, one in zip(written, runs, strict=True):
        room.ready(folder, "out")
        prepare.say(report_page.write(folder, report.page(one)))
    if len(runs) > 1:
        names = sorted(str(f.resolve()) for f in folders)
        out = Path(settings.out or Path("runs") / f"report-{artifacts.fingerprint(names)[:8]}")
        room.ready(out, "out")
        prepare.say(report_page.write(out, report_compare.page(runs)))
        written = [*written, out]
    return written


def read(folder: Path) -> report_run.Run:
    """What a run's directory tells; DataError where it tells nothing."""
    if not any((folder / name).is_file() for name in TELLING):
        raise DataError(
            f"{folder}: holds none of {', '.join(TELLING)}; name a directory of draftsmith train or evaluate"
        )
    if (found := claims.stored(folder)) is None:
        return report_run.read(folder, {}, "")
    own = cast("dict[str, Any]", OmegaConf.to_container(found))
    values = report_run.clean(shown.of(own))
    return report_run.read(folder, values, OmegaConf.to_yaml(OmegaConf.create(values)))


def write(folder: Path) -> None:
    """The report of one run, by the verb that has just written there, which does not fail by it."""
    try:
        prepare.say(report_page.write(folder, report.page(read(folder))))
    except Exception as e:
        said = shown.clean(" ".join(str(e).split()))
        prepare.say(f"warning: no report ({type(e).__name__}: {said}); draftsmith report run_dirs=[{folder}] makes it")


def main() -> None:
    config.command("report", run)


if __name__ == "__main__":
    main()
