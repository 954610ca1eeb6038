"""Whether the tests of the guards can fail: each guard is taken out of a copy of the package, and its test must be red.

    python tests/faults/mutations.py            all of them; exit 1 if a test stays green without its guard
    python tests/faults/mutations.py fsync      those whose names hold the word

The same tests are run on an unchanged copy first: a test that is red with its guard shows nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
SECONDS = 300  # that a test may take
GREEN, RED = 0, 1  # pytest's answers; another one is neither


@dataclass(frozen=True)
class Guard:
    """What is written in a file of src as `old` becomes `new`, and `test` must notice."""

    name: str
    file: str
    old: str
    new: str
    test: str


UNIT, FAULTS = "tests/unit", "tests/faults"
ARTIFACTS, CHECKPOINT = f"{UNIT}/test_artifacts.py", f"{UNIT}/training/test_checkpoint.py"
JOURNAL, FIT, NUMERICS = f"{UNIT}/data/test_journal.py", f"{UNIT}/training/test_fit.py", f"{FAULTS}/test_numerics.py"
GUARDS = [
    Guard(
        "fsync of a file before it is renamed",
        "artifacts.py",
        '            _sync(temporary)\n            faults.point("file.synced")',
        '            faults.point("file.synced")',
        f"{ARTIFACTS}::test_everything_is_on_the_disk_before_it_has_its_name",
    ),
    Guard(
        "fsync of a folder after a rename in it",
        "artifacts.py",
        '            faults.point("publish.named")\n            _sync(target.parent)',
        '            faults.point("publish.named")',
        f"{ARTIFACTS}::test_everything_is_on_the_disk_before_it_has_its_name",
    ),
    Guard(
        "fsync of a folder's files before it is named",
        "artifacts.py",
        '    _sync(path)\n    return {"bytes"',
        '    return {"bytes"',
        f"{ARTIFACTS}::test_everything_is_on_the_disk_before_it_has_its_name",
    ),
    Guard(
        "sha256 of every file",
        "artifacts.py",
        'if found != (want := files[name])["sha256"]:',
        'if not (want := files[name])["sha256"]:',
        f"{ARTIFACTS}::test_verify_names_the_damaged_file",
    ),
    Guard(
        "manifests list nothing outside",
        "artifacts.py",
        'if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():',
        "if not name.isprintable():",
        f"{ARTIFACTS}::test_a_manifest_that_points_outside_its_folder_is_refused",
    ),
    Guard(
        "an old folder stays until the new one is whole",
        "training/checkpoint.py",
        "    for old in done[:-keep]:",
        "    for old in done[:-keep] + done[:1]:",
        f"{CHECKPOINT}::test_rotation_keeps_the_newest",
    ),
    Guard(
        "schema of a newer version",
        "artifacts.py",
        "if isinstance(schema, int) and schema > SCHEMA:",
        "if isinstance(schema, int) and schema > SCHEMA + 1:",
        f"{FAULTS}/test_golden.py",
    ),
    Guard(
        "a damaged checkpoint is passed over",
        "training/checkpoint.py",
        "    artifacts.verify(path, manifest=SEAL)\n",
        "",
        f"{CHECKPOINT}::test_a_damaged_newest_one_falls_back",
    ),
    Guard(
        "checkpoints belong to their base and rows",
        "training/fit.py",
        "if changed := [name for name in apart if name not in loose]:",
        "if changed := [name for name in apart if name in loose]:",
        f"{FIT}::test_a_checkpoint_of_another_base_or_other_rows",
    ),
    Guard(
        "a folder never mixes two runs",
        "claims.py",
        'if refused := {k: changed[k] for k in changed if fate[k] == "refused"}:',
        'if refused := {k: changed[k] for k in changed if fate[k] == "never"}:',
        f"{UNIT}/test_claims.py::test_claim_accepts_the_same_run_and_names_what_differs",
    ),
    Guard(
        "one writer per folder",
        "prepare.py",
        "        if not _taken(lock, fcntl.LOCK_EX, tries=20):",
        "        if not _taken(lock, fcntl.LOCK_SH, tries=20):",
        "tests/integration/test_cli.py::test_a_second_writer_is_refused_and_a_dead_ones_lock_is_free",
    ),
    Guard(
        "gradients that are not finite reach no weight",
        "training/module.py",
        "                    p.grad = None  #",
        "                    pass  #",
        f"{NUMERICS}::test_steps_may_be_left_out",
    ),
    Guard(
        "losses that are not finite reach no weight",
        "training/module.py",
        'losses.append(loss * torch.where(loss.detach().isfinite(), 1.0, float("nan")))',
        "losses.append(loss)",
        f"{NUMERICS}::test_a_loss_that_is_not_finite_counts_whatever_its_gradient",
    ),
    Guard(
        "only so many steps are left out",
        "training/nonfinite.py",
        "if self.left_out > self.most:",
        "if self.left_out > self.most + 1:",
        f"{NUMERICS}::test_one_more_than_allowed_stops",
    ),
    Guard(
        "mask check: a turn that does not verify is no row",
        "data/chat.py",
        "        if ids[n] in ends and _whole(script, i, script.decode(ids[begin:n]), may_think):\n",
        "        if ids[n] in ends:\n",
        f"{UNIT}/data/test_chat.py::test_what_does_not_verify_is_refused",
    ),
    Guard(
        "rows of which nothing is learned are left out",
        "data/importing.py",
        "    learns_N = rows.learns()\n",
        "    learns_N = rows.learns() | True\n",
        f"{FAULTS}/test_bad_inputs.py::test_it_ends_as_documented[all tokens masked]",
    ),
    Guard(
        "randomness is the step's and the head's",
        "training/module.py",
        "with rekeyed(self.seed, step, part, self.global_rank, name), autocast:",
        "with autocast:",
        f"{FIT}::test_randomness_is_the_step_s_and_the_head_s",
    ),
    Guard(
        "a first signal saves",
        "training/callbacks.py",
        "        stop = self.asked is not None\n",
        "        stop = False\n",
        f"{FIT}::test_a_signal_stops_at_the_step_s_edge_and_resumes",
    ),
    Guard(
        "a second signal waits for nothing",
        "training/callbacks.py",
        "            signals.leave()\n",
        "            pass\n",
        f"{UNIT}/training/test_callbacks.py::test_a_second_signal_leaves_at_once",
    ),
    Guard(
        "Lightning's own signal handlers stay out",
        "training/fit.py",
        "    engine._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]\n",
        "",
        f"{FIT}::test_a_signal_stops_at_the_step_s_edge_and_resumes",
    ),
    Guard(
        "a torn line is cut off a journal",
        "data/journal.py",
        "        self._file.truncate(self._whole)\n\n",
        "\n",
        f"{JOURNAL}::test_a_tail_torn_anywhere_costs_its_row_alone",
    ),
    Guard(
        "rows out and refused are what was asked",
        "data/journal.py",
        "if twice or conversations | refused != asked or conversations & refused:",
        "if twice:",
        f"{JOURNAL}::test_what_does_not_add_up_is_not_sealed",
    ),
    Guard(
        "no shard lies there that the manifest does not list",
        "data/rows.py",
        "    if stray:\n",
        "    if not stray:\n",
        f"{UNIT}/data/test_rows.py::test_what_was_changed_is_refused_by_name",
    ),
    Guard(
        "rows are of this tokenizer and template",
        "data/rows.py",
        "if wrote.get(name) and wrote[name] != getattr(spec, name):",
        "if wrote.get(name) and not getattr(spec, name):",
        f"{UNIT}/data/test_rows.py::test_rows_of_another_base_are_refused",
    ),
    Guard(
        "captures are what the base computes",
        "data/store.py",
        "            if not error <= most:",
        "            if not error <= 1e9:",
        f"{UNIT}/data/test_store.py::test_a_shard_that_is_off_by_one_position_does_not",
    ),
    Guard(
        "a head is of this base",
        "exporters/native.py",
        "        if theirs != ours:\n",
        "        if not ours:\n",
        f"{UNIT}/exporters/test_native.py::test_another_base_is_refused_with_both_values",
    ),
    Guard(
        "a head has all its tensors and no other",
        "exporters/native.py",
        "strict=True, assign=True",
        "strict=False, assign=True",
        f"{UNIT}/exporters/test_native.py::test_other_tensors_are_refused",
    ),
    Guard(
        "a head answers as it did",
        "exporters/native.py",
        'if found := capsule.differences(folder / capsule.FILE, described["head"], head.state_dict()):',
        'if found := capsule.differences(folder / capsule.FILE, described["head"], head.state_dict())[9:]:',
        f"{UNIT}/exporters/test_capsule.py::test_every_tensor_is_told_from_another",
    ),
    Guard(
        "the base did not move",
        "training/fit.py",
        "    if after == before and not asking:\n",
        "    if True:\n",
        f"{FAULTS}/test_drift.py",
    ),
    Guard(
        "allowlist of _target_",
        "config.py",
        "if not name.startswith(ALLOWED_PACKAGES) and name not in ALLOWED_TARGETS:",
        "if not name:",
        f"{UNIT}/test_config.py::test_targets_outside_the_allowlist_are_refused_before_import",
    ),
    Guard(
        "pickles stay unread",
        "exporters/published.py",
        "        if file.suffix in PICKLES:\n",
        "        if not file.suffix:\n",
        f"{UNIT}/exporters/test_published.py::test_a_pickle_is_never_run",
    ),
    Guard(
        "links lead nowhere else",
        "artifacts.py",
        "        if elsewhere := outside(folder, path):\n",
        "        if elsewhere := None:\n",
        f"{FAULTS}/test_malicious.py",
    ),
    Guard(
        "secrets are refused on the command line",
        "config.py",
        'if why := shown.secret_in(text) if isinstance(text, str) else "":',
        'if why := "":',
        "tests/integration/test_tracking.py::test_a_secret_on_the_command_line_is_refused_unseen",
    ),
    Guard(
        "what does not fit on the disk is not begun",
        "room.py",
        "    if needs > free:\n",
        "    if needs < 0:\n",
        f"{UNIT}/test_room.py::test_a_ready_folder_is_empty_and_a_small_disk_leaves_none",
    ),
    Guard(
        "a folder that was removed does not come back",
        "room.py",
        "    if not folder.is_dir():\n",
        "    if not folder.name:\n",
        f"{UNIT}/test_room.py::test_a_folder_that_is_gone",
    ),
    Guard(
        "redirects are not followed with the key",
        "data/server.py",
        "follow_redirects=False",
        "follow_redirects=True",
        f"{FAULTS}/test_malicious.py",
    ),
]


def copied(folder: Path, guard: Guard | None) -> None:
    """The package in `folder`, importable from there, without the guard."""
    shutil.copytree(ROOT / "src", folder / "draftsmith", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", folder / "draftsmith" / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    if guard is not None:
        path = folder / "draftsmith" / guard.file
        text = path.read_text()
        if text.count(guard.old) != 1:
            raise SystemExit(f"{guard.name}: src/{guard.file} holds it {text.count(guard.old)} times: {guard.old!r}")
        path.write_text(text.replace(guard.old, guard.new))


def answer(tests: Sequence[str], guard: Guard | None) -> tuple[int, str]:
    """pytest's exit code and output for these tests with the package as it is without the guard."""
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder), guard)
        mine = {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not slow", "-p", "no:cacheprovider"]
        command += ["--basetemp", f"{folder}/tmp", *tests]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **mine}, capture_output=True, text=True, timeout=SECONDS
        )
    return done.returncode, done.stdout + done.stderr


def main(words: Sequence[str]) -> int:
    guards = [g for g in GUARDS if all(word in g.name for word in words)]
    if not guards:
        raise SystemExit(f"no guard is called {' '.join(words)}; there are: {'; '.join(g.name for g in GUARDS)}")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        code, output = answer(sorted({g.test for g in guards}), None)
        if code != GREEN:
            print(output)
            raise SystemExit("the tests are not green with their guards")
        bad = 0
        for guard, (code, output) in zip(guards, pool.map(lambda g: answer([g.test], g), guards), strict=True):
            told = {RED: "red", GREEN: "GREEN: its test did not notice"}.get(code, f"pytest answered {code}")
            print(f"{guard.name} ({guard.file}) -> {told}", flush=True)
            if code != RED:
                bad += 1
                print(output[-3000:])
    print(f"{len(guards) - bad} of {len(guards)} guards: without them their test is red")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
