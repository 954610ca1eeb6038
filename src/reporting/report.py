"""The report of one run: everything that its directory tells, each part with a line where it is missing."""

from __future__ import annotations

from draftsmith.reporting import report_evaluation as evaluation
from draftsmith.reporting import report_training as training
from draftsmith.reporting.report_page import Page, Words
from draftsmith.reporting.report_run import Run


def page(run: Run) -> Page:
    notes = []
    if run.metrics and not run.complete:
        notes.append(Words("Training is not complete: this report tells of what there is so far.", "warning"))
    sections = [
        evaluation.at_a_glance(run),
        evaluation.acceptance(run),
        evaluation.speedup(run),
        training.curves(run),
        evaluation.tree(run),
        evaluation.calibration(run),
        training.time(run),
        training.data(run),
        evaluation.sample(run),
        training.log(run),
        training.again(run),
    ]
    about = training.facts_of(run)
    return Page(run.name, about, evaluation.tiles(run), [s for s in sections if s is not None], notes)
