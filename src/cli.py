"""`draftsmith VERB …` is `python -m draftsmith.VERB …`: one process, however it was called."""

from __future__ import annotations

import difflib
import os
import sys

VERBS = {
    "quickstart": "the whole loop on this machine: base, rows, head, proof, speed, export",
    "doctor": "what is wrong with the environment, the rows or the base, before anything is spent on them",
    "distill": "prompts -> rows, written by the base itself",
    "label": "per-token labels for gates: accepted drafts, or tokens that matter",
    "capture": "rows -> a store: what the base leaves for heads, on disk",
    "train": "rows -> heads, on the frozen base",
    "plan": "memory, disk, hours and the cheapest mode of a training, before anything is loaded",
    "evaluate": "tokens per step, speed, and proof that the output is the base's own",
    "tune": "the tree of a drafter, or the threshold of a gate, for this machine, stored with it",
    "bakeoff": "heads compared at equal rows and equal CPU-seconds: a table and a picture",
    "sweep": "the settings of one or several heads that draft best: a study that stops poor trials and goes on",
    "report": "what a run did, as one page; several runs beside one another",
    "adopt": "published weights -> a head of ours, to evaluate, to train on or to export",
    "export": "a trained head -> a folder that an inference server loads",
    "bench": "what one training step costs, as a ratio of the base's forward",
    "bench_data": "how fast rows are answered, encoded and packed",
    "bench_decoding": "what the engine costs beside the base's own forwards, and how honest its baseline is",
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: draftsmith VERB [key=value …]     (draftsmith VERB --help for its keys)\n")
        print("\n".join(f"  {verb:<14} {what}" for verb, what in VERBS.items()))
        return
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(VERBS)}"
        print(f"error: draftsmith: no such verb '{name}'{hint}", file=sys.stderr)
        sys.exit(2)
    os.execv(sys.executable, [sys.executable, "-m", f"draftsmith.{name}", *sys.argv[2:]])
