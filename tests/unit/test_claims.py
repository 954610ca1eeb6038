"""Whose run a folder holds: the same, an older one's, another one's."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf, open_dict

from draftsmith import claims, config, errors
from draftsmith.errors import ConfigError
from draftsmith.training.settings import ResumeConfig


def test_claim_accepts_the_same_run_and_names_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    cfg = config.compose("train", [f"run_dir={folder}"])
    claims.claim(cfg, folder)
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]
    stored = (folder / "config.yaml").read_text()
    assert str(tmp_path) not in stored
    claims.claim(cfg, folder)
    claims.claim(config.compose("train", ["run_dir=elsewhere", "trainer.log_every=3", "debug=true"]), folder)
    with pytest.raises(ConfigError) as caught:
        claims.claim(config.compose("train", ["seed=7", "optimizer.lr=0.5"]), folder)
    assert "seed: 0 -> 7" in str(caught.value)
    assert "optimizer.lr: 0.001 -> 0.5" in str(caught.value)
    assert "data" not in str(caught.value).replace(str(tmp_path), "")
    assert (folder / "config.yaml").read_text() == stored


def test_a_run_goes_on_that_is_older_than_a_key_which_is_off(tmp_path: Path) -> None:
    quickstart = config.compose("train", ["experiment=quickstart"])
    assert str(config.run_dir(quickstart, "train")) == "runs/quickstart-0f006be9"  # as before there were such keys
    cfg = config.compose("train")
    old = cfg.copy()
    with open_dict(old):
        del old.base.fake, old.base.shape, old.data.one_batch, old.logger
    claims.claim(old, tmp_path)
    claims.claim(cfg, tmp_path)
    with pytest.raises(ConfigError, match=r"data\.one_batch: None -> True"):
        claims.claim(config.compose("train", ["data.one_batch=true"]), tmp_path)


def test_a_stored_configuration_is_the_same_run(tmp_path: Path) -> None:
    """Through yaml and back, small floats and empty groups included."""
    cfg = config.compose("train", ["optimizer.lr=3e-7", "+optimizer.heads.medusa.lr=1e-5"])
    claims.claim(cfg, tmp_path)
    again = OmegaConf.load(tmp_path / "config.yaml")
    assert config.identity(again) == config.identity(cfg)


def test_claim_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.ResourceError, match="run"):
        claims.claim(config.compose("train"), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("key", "old", "new", "fate"),
    [
        ("base.path", "a", "b", "moved"),
        ("base.path", None, "b", "refused"),  # a recipe before
        ("base.revision", "a", "b", "refused"),
        ("data.sources.x.path", "a", "b", "moved"),
        ("data.prompts.path", "a", "b", "moved"),
        ("data.validation.path", "a", "b", "refused"),  # no checkpoint is tied to what is only measured
        ("drafter", "a", "b", "moved"),
        ("companion.path", "a", "b", "moved"),
        ("seed", 0, 1, "refused"),
    ],
)
def test_what_is_a_move(tmp_path: Path, key: str, old: object, new: object, fate: str) -> None:
    values = [config.compose("train", ["base=hf", "base.path=x", "data=jsonl", "data.path=x"]) for _ in range(2)]
    for cfg, value in zip(values, (old, new), strict=True):
        with open_dict(cfg):
            OmegaConf.update(cfg, key, value, force_add=True)
    claims.claim(values[0], tmp_path, resume=ResumeConfig())
    if fate == "moved":
        assert claims.claim(values[1], tmp_path, resume=ResumeConfig()) == {key: (old, new)}
    else:
        with pytest.raises(ConfigError, match=f"{key}: {old} -> {new}"):
            claims.claim(values[1], tmp_path, resume=ResumeConfig())
    with pytest.raises(ConfigError, match=f"{key}: {old} -> {new}"):  # a folder that no checkpoint holds to contents
        claims.claim(values[1], tmp_path)


@pytest.mark.parametrize(
    ("allow", "lets"),
    [
        ([], ""),
        (["optimizer", "seed", "head"], ""),
        (["base.path"], "base"),
        (["data"], "rows store"),
        (["data.length"], "rows store"),
        (["drafter"], "beside gate"),
        (["companion.path"], "beside gate"),
    ],
)
def test_which_ties_a_key_loosens(allow: list[str], lets: str) -> None:
    ties = ["base", "rows", "store", "beside gate"]
    assert " ".join(tie for tie in ties if ResumeConfig(allow).lets(tie)) == lets


def test_what_changed_is_read_back_past_a_torn_line(tmp_path: Path) -> None:
    assert claims.changes(tmp_path) == []
    cfg = config.compose("train")
    claims.accept(cfg, tmp_path, {}, 3)
    assert list(tmp_path.iterdir()) == []  # nothing differs: nothing is written
    (tmp_path / "events.jsonl").write_text('{"event": "started", "st')
    claims.accept(cfg, tmp_path, {"seed": (0, 7)}, 3)
    assert claims.changes(tmp_path) == [{"step": 3, "keys": {"seed": [0, 7]}}]
    kept = claims.stored(tmp_path)
    assert kept is not None
    assert config.identity(kept) == config.identity(cfg)
