"""draftsmith export: a trained head -> a folder that an inference server loads."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from draftsmith import artifacts, beside, certify, config, evaluate, prepare, pushing, room
from draftsmith.errors import ConfigError


def run(cfg: DictConfig) -> list[Path]:
    """Exports every head of the run; returns the folders."""
    run_dir = config.run_dir(cfg, "export")
    exporter = config.build(cfg.exporter, "exporter")
    folders, of_run = evaluate.heads_of(run_dir, cfg.load)
    base_config = evaluate.base_of(cfg, folders, of_run)
    own = {field: cfg[field] for field in ("push", "push_private")}
    pushes = config.typed(own, pushing.PushConfig, "export")
    repositories = pushing.targets(pushes, folders)
    named = cfg.exporter.get("runtime") or cfg.exporter._target_.split(".")[-2]
    out = Path(cfg.out) if cfg.out else run_dir / "export" / named
    places = {name: out / name if len(folders) > 1 else out for name in folders}
    for place in places.values():
        refuse_foreign(place)

    from draftsmith.exporters import card, native

    base = prepare.load_base(base_config)
    heads = {name: beside.checked(folder, base) for name, folder in folders.items()}
    if hasattr(exporter, "check"):  # all of them before any is written
        for name, head in heads.items():
            exporter.check(head, base, name=name)
    share = 0.5 if getattr(exporter.config, "dtype", None) in ("bfloat16", "float16") else 1.0
    for name, place in places.items():
        room.ready(place.absolute().parent, "out", share * native.size(heads[name], base.adapter))
    made = []
    for name, head in heads.items():
        made.append(exporter.save(places[name], head, base, name=name))
        prepare.say(f"{name} -> {made[-1]}")
        if hasattr(exporter, "start"):
            prepare.say(exporter.start(made[-1], head, base))
        evaluated = run_dir / "evaluation.json" if of_run is not None and isinstance(exporter, native.Native) else None
        if evaluated and (measured := card.results(evaluated, name, head)):
            card.add_results(made[-1], head, measured)
            prepare.say(f"{name}: its card tells what evaluation.json measured")
        travels = certify.travel(run_dir, made[-1], head, getattr(exporter.config, "dtype", None))
        if travels is not None:
            prepare.say(f"{name}: {travels}")
    if repositories and Path(base.spec.path).is_absolute():
        prepare.say(f"note: it names the base {base.spec.path}; base=hf base.path=<its hub id> names it for others")
    for name, repository in repositories.items():
        address = pushing.push(places[name], repository, private=pushes.push_private)
        prepare.say(f"{name} -> {address}")
    return made


def refuse_foreign(place: Path, kind: str = "export") -> None:
    """ConfigError unless `place` is free, or holds what an earlier command of this kind wrote, and nothing else: all of
    it is replaced."""
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    manifest = place / artifacts.MANIFEST
    told = artifacts.read_json(manifest) if manifest.is_file() else {}
    ours = isinstance(told, dict) and str(told.get("kind")).startswith(kind) and isinstance(told.get("files"), dict)
    known = {artifacts.MANIFEST, *told["files"]} if ours else set[str]()
    if not ours or any(str(p.relative_to(place)) not in known for p in place.rglob("*") if p.is_file()):
        raise ConfigError(f"out: {place} exists and is no {kind} of ours, or holds more than that; name another folder")


def main() -> None:
    config.command("export", run)


if __name__ == "__main__":
    main()
