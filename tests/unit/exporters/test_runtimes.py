"""Which server reads which head: the table, what it refuses and offers instead, the commands, and draftsmith export."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from draftsmith import artifacts, config, export
from draftsmith.base import create
from draftsmith.base.lm import BaseLM
from draftsmith.contracts import Head
from draftsmith.errors import ConfigError, DataError
from draftsmith.exporters import capsule, native
from draftsmith.exporters.runtimes import SERVERS, Runtime, RuntimeConfig

CONF = Path(__file__).parents[3] / "conf"
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS: dict[str, dict[str, Any]] = {
    "medusa": {"num_heads": 2},
    "medusa2": {"num_heads": 2},
    "eagle3": {"draft_vocab_size": 30, "depth": 2, "layers": [1, 2, 3]},
    "hydra": {"num_heads": 2},
    "hydra_pp": {"num_heads": 2, "num_layers": 2},
    "clover": {"num_heads": 2},
    "clover2": {"num_heads": 3},
    "kangaroo": {"exit_layer": 1},
    "acceptance": {"hidden_size": 16, "num_layers": 2},
    "kv_prediction": {"keep": 0.5},
}
MEDUSA = {"portable", "vllm", "vllm_medusa", "tgi", "tensorrt_llm", "mlc"}
TAKEN = {
    **dict.fromkeys(("medusa", "medusa2"), MEDUSA),
    "eagle3": {"vllm", "sglang", "tensorrt_llm", "llama_cpp", "speculators"},
    **{name: {"vllm"} for name in ("hydra", "hydra_pp", "clover", "clover2", "kangaroo", "acceptance")},
    "hydra": {"vllm", "vllm_medusa"},
    "kv_prediction": set[str](),
}
PLUGGED = [name for name, taken in TAKEN.items() if "vllm" in taken and name not in ("medusa", "medusa2", "eagle3")]


@pytest.fixture(scope="module")
def base() -> BaseLM:
    return BaseLM(create.llama(SHAPE, None, seed=0), path="some/base")


def head_of(name: str, base: BaseLM, **settings: Any) -> Head:
    """Of a head's yaml, with random weights."""
    node: Any = {**OmegaConf.to_container(OmegaConf.load(CONF / f"head/{name}.yaml")), **HEADS[name], **settings}
    torch.manual_seed(0)
    kind = config.target(node, name)
    head = kind(config.typed(node, kind.Config, name), base.spec)
    if hasattr(head, "d2t"):
        head.initialise(base, torch.rand(40))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    if name == "acceptance":
        head.attach(head_of("hydra", base))
    return head.eval()


def save(runtime: str, folder: Path, head: Head, base: BaseLM, dtype: str | None = None) -> Path:
    return Runtime(RuntimeConfig(runtime, dtype)).save(folder, head, base, name="mine")


def test_every_head_is_in_this_file_and_every_server_has_a_yaml() -> None:
    assert {p.stem for p in (CONF / "head").glob("*.yaml")} == HEADS.keys() == TAKEN.keys()
    for name in SERVERS:
        cfg = config.compose("export", [f"exporter={name}", "run_dir=x"])
        assert config.build(cfg.exporter, "exporter").config == RuntimeConfig(name)


@pytest.mark.parametrize("runtime", SERVERS)
@pytest.mark.parametrize("name", HEADS)
def test_a_server_takes_what_it_reads_and_refuses_the_rest(
    tmp_path: Path, base: BaseLM, name: str, runtime: str
) -> None:
    """A refusal names the runtime, what it reads and where else the head can go, and every place it names takes it."""
    head = head_of(name, base)
    if runtime in TAKEN[name]:
        assert artifacts.verify(save(runtime, tmp_path / "out", head, base))
        return
    with pytest.raises(ConfigError, match=f"^exporter={runtime}: .* for mine .* use exporter=") as caught:
        save(runtime, tmp_path / "out", head, base)
    assert list(tmp_path.iterdir()) == []
    offered = str(caught.value).rpartition("use exporter=")[2].replace(" or ", ", ").split(", ")
    assert {o.removesuffix(" (our plugin)") for o in offered} - {"reference", "custom_generate", "native"} == TAKEN[
        name
    ]
    assert all((CONF / f"exporter/{o.removesuffix(' (our plugin)')}.yaml").exists() for o in offered)


def test_the_words_of_a_refusal(tmp_path: Path, base: BaseLM) -> None:
    with pytest.raises(ConfigError) as caught:
        save("tgi", tmp_path / "out", head_of("hydra", base), base)
    assert str(caught.value) == (
        "exporter=tgi: text-generation-inference loads Medusa only; for mine (Hydra) use"
        " exporter=vllm (our plugin), vllm_medusa, reference, custom_generate or native"
    )


@pytest.mark.parametrize("name", PLUGGED)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_our_plugin_serves_the_native_folder(tmp_path: Path, base: BaseLM, name: str, dtype: str | None) -> None:
    """Whole, in the precision asked for, with a capsule of it, and with all that was said of the head."""
    head = head_of(name, base)
    head.said = {"training": {"rows": 3}}
    folder = save("vllm", tmp_path / "out", head, base, dtype)
    back = native.load(folder, base.spec)
    assert back.said["training"] == {"rows": 3}
    assert type(back) is type(head)
    floats = {t.dtype for t in load_file(folder / "model.safetensors").values() if t.is_floating_point()}
    assert floats == {torch.bfloat16 if dtype else torch.float32}
    assert all(torch.equal(t, head.state_dict()[k].to(t.dtype)) for k, t in back.state_dict().items())
    capsule.check(back, base, back.golden, folder)
    assert next(head.parameters()).dtype == torch.float32  # the one that was given is as it was


def test_a_gate_of_a_draft_model_is_refused(tmp_path: Path, base: BaseLM) -> None:
    head = head_of("acceptance", base)
    head.said = {"beside": {"kind": "draft_model", "path": "some/companion"}}
    with pytest.raises(ConfigError, match=r"second language model.*use exporter=reference, custom_generate or native"):
        save("vllm", tmp_path / "out", head, base)


def test_what_comes_back_is_asked_for_its_answers(
    tmp_path: Path, base: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every form is published only after its capsule was answered."""

    def check(*args: Any, **kwargs: Any) -> None:
        raise DataError("does not answer")

    monkeypatch.setattr(capsule, "check", check)
    for name, runtime in [("medusa", "vllm"), ("eagle3", "sglang"), ("medusa", "portable")]:
        with pytest.raises(DataError, match="does not answer"):
            save(runtime, tmp_path / runtime, head_of(name, base), base)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ the start line


def words(runtime: str, head: Head, base: BaseLM, folder: str = "/my heads/one") -> list[str]:
    return shlex.split(Runtime(RuntimeConfig(runtime)).start(Path(folder), head, base), comments=True)


def option(line: list[str], name: str) -> str:
    return line[line.index(name) + 1]


def test_vllm_is_started_with_the_folder_and_the_depth(base: BaseLM) -> None:
    medusa, eagle3 = head_of("medusa", base), head_of("eagle3", base)
    for runtime, head, method in (
        ("vllm", medusa, "medusa"),
        ("portable", medusa, "medusa"),
        ("vllm", eagle3, "eagle3"),
    ):
        line = words(runtime, head, base)
        assert line[:3] == ["vllm", "serve", "some/base"]
        told = json.loads(option(line, "--speculative-config"))
        assert told == {"method": method, "model": "/my heads/one", "num_speculative_tokens": 2}
    assert words("speculators", eagle3, base) == ["vllm", "serve", "/my heads/one"]


@pytest.mark.parametrize(("depth", "want"), [(1, 1), (2, 2), (9, 2)])
def test_as_many_drafts_as_tune_found_best(base: BaseLM, depth: int, want: int) -> None:
    head = head_of("medusa", base)
    head.said = {"tuned": {"depth": depth}}
    assert json.loads(option(words("vllm", head, base), "--speculative-config"))["num_speculative_tokens"] == want


@pytest.mark.parametrize("name", PLUGGED)
def test_our_plugin_is_started_with_the_head(base: BaseLM, name: str) -> None:
    head = head_of(name, base)
    line = words("vllm", head, base)
    told = json.loads(option(line, "--speculative-config"))
    assert told["method"] == "custom_class"
    assert told["model"] == "draftsmith.serving.vllm_plugin.HeadProposer"
    assert told["num_speculative_tokens"] >= 1
    assert json.loads(option(line, "--additional-config"))["draft_head"] == "/my heads/one"
    attends = {"hydra": False, "kangaroo": False}.get(name, True)  # these need no position twice, or keep no K/V of it
    assert ("--no-enable-prefix-caching" in line) is attends


def test_the_plugins_name_is_a_class_that_is_there() -> None:
    from draftsmith.exporters.runtimes import PLUGIN

    module, _, name = PLUGIN.rpartition(".")
    source = (CONF.parent / "src" / f"{module.removeprefix('draftsmith.').replace('.', '/')}.py").read_text()
    assert f"class {name}" in source


def test_a_gate_travels_with_its_drafter(tmp_path: Path, base: BaseLM) -> None:
    """And is started no deeper than either goes."""
    head = head_of("acceptance", base)
    folder = save("vllm", tmp_path / "out", head, base, "bfloat16")
    drafter = native.load(folder / "drafter", base.spec)
    assert all(torch.equal(t, head.beside.state_dict()[k]) for k, t in drafter.state_dict().items())
    sha256 = artifacts.tensors_sha256(drafter.state_dict())
    assert native.load(folder, base.spec).said["beside"] == {"kind": "Hydra", "path": None, "sha256": sha256}
    line = words("vllm", head, base, str(folder))
    assert json.loads(option(line, "--speculative-config"))["num_speculative_tokens"] == 2


def test_the_other_servers_are_started_with_their_own_words(base: BaseLM) -> None:
    medusa, eagle3 = head_of("medusa", base), head_of("eagle3", base)
    line = words("tgi", medusa, base)
    assert line == ["text-generation-launcher", "--model-id", "/my heads/one", "--speculate", "2"]
    line = words("sglang", eagle3, base)
    assert line[:3] == ["python", "-m", "sglang.launch_server"]
    assert option(line, "--model-path") == "some/base"
    assert option(line, "--speculative-algorithm") == "EAGLE3"
    assert option(line, "--speculative-draft-model-path") == "/my heads/one"
    steps = [option(line, f"--speculative-{n}") for n in ("num-steps", "eagle-topk", "num-draft-tokens")]
    assert steps == ["2", "1", "3"]
    line = words("llama_cpp", eagle3, base)
    assert option(line, "--target-model-dir") == "some/base"
    assert option(line, "-md") == "/my heads/one.gguf"
    assert option(line, "--spec-draft-n-max") == "2"
    line = words("tensorrt_llm", eagle3, base)
    assert line[:2] == ["trtllm-serve", "some/base"]
    assert option(line, "--extra_llm_api_options") == "/my heads/one/llm_api_options.yaml"
    line = words("tensorrt_llm", medusa, base)
    assert option(line, "--num_medusa_heads") == "2"
    assert json.loads(option(line, "--medusa_choices")) == [[0], [0, 0]]
    line = words("mlc", medusa, base)
    assert option(line, "--additional-models") == "/my heads/one-mlc"
    assert line.count("--model-type") == 2


# --------------------------------------------------------------------------------------------------- draftsmith export


@pytest.fixture
def trained(tmp_path: Path) -> list[str]:
    """The words that name a base and a Medusa head on disk."""
    folder = tmp_path / "base"
    folder.mkdir()
    create.save(create.llama(SHAPE, None, seed=0), None, folder)
    from draftsmith.base.lm import load

    loaded = load(str(folder))
    head = head_of("medusa", loaded)
    head.golden = capsule.record(head, loaded)
    native.save(tmp_path / "heads" / "medusa", head, name="medusa")
    return [f"load=[{tmp_path}/heads/medusa]", "base=hf", f"base.path={folder}", f"run_dir={tmp_path}/run"]


def run(trained: list[str], *more: str) -> list[Path]:
    return export.run(config.compose("export", [*trained, *more]))


def test_export_says_how_the_server_is_started(
    tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = run(trained, "exporter=tgi", f"out={tmp_path}/out")
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"medusa -> {tmp_path}/out",
        f"text-generation-launcher --model-id {tmp_path}/out --speculate 2",
    ]
    assert run(trained, "exporter=tgi", f"out={tmp_path}/out") == [folder]  # an export of ours is replaced
    run(trained, "exporter=native", f"out={tmp_path}/native")
    assert capsys.readouterr().out.splitlines()[-1] == f"medusa -> {tmp_path}/native"


@pytest.mark.parametrize("exporter", ["vllm", "portable", "native", "reference"])
def test_the_folder_is_named_after_the_exporter(tmp_path: Path, trained: list[str], exporter: str) -> None:
    assert run(trained, f"exporter={exporter}") == [tmp_path / "run" / "export" / exporter]


@pytest.mark.parametrize("exporter", ["vllm", "native", "reference"])
def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path, trained: list[str], exporter: str) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"^out: .*thesis exists and is no export of ours, .*; name another folder$"):
        run(trained, f"exporter={exporter}", f"out={out}")
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    assert run(trained, f"exporter={exporter}", f"out={out}") == [out]  # an empty one is taken


def test_a_file_is_not_replaced(tmp_path: Path, trained: list[str]) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no export of ours"):
        run(trained, f"out={tmp_path}/out")


@pytest.mark.parametrize("out", ["heads/medusa", "base/../heads/medusa"])
def test_the_head_itself_is_not_replaced(tmp_path: Path, trained: list[str], out: str) -> None:
    before = {p.name: p.read_bytes() for p in (tmp_path / "heads" / "medusa").iterdir()}
    with pytest.raises(ConfigError, match="exists and is no export of ours"):
        run(trained, f"out={tmp_path}/{out}")
    assert {p.name: p.read_bytes() for p in (tmp_path / "heads" / "medusa").iterdir()} == before


@pytest.mark.parametrize("kind", ["base", "rows", "head", None])
def test_what_is_no_export_is_not_replaced_though_it_has_a_manifest(
    tmp_path: Path, trained: list[str], kind: str | None
) -> None:
    out = tmp_path / "out"
    if kind is None:  # an export of ours, with something of somebody's in it
        run(trained, "exporter=tgi", f"out={out}")
        run(trained, "exporter=vllm", f"out={out}")  # alone it may be replaced
    else:
        with artifacts.publish(out, kind=kind) as temporary:
            (temporary / "weights").write_text("mine")
    (out / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no export of ours, or holds more than that"):
        run(trained, f"out={out}")
    assert (out / "precious.txt").read_text() == "mine"


def test_another_base_is_noticed_before_anything_is_written(tmp_path: Path, trained: list[str]) -> None:
    """Of the same sizes, so that the folder loads: the head answers its capsule otherwise."""
    other = tmp_path / "other"
    other.mkdir()
    create.save(create.llama(SHAPE, None, seed=7), None, other)
    with pytest.raises(DataError):
        run(trained, f"base.path={other}", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_sizes_is_refused_with_both(tmp_path: Path, trained: list[str]) -> None:
    """So no form can be written with sizes that are not the head's."""
    other = tmp_path / "wide"
    other.mkdir()
    create.save(create.llama({**SHAPE, "hidden_size": 32}, None, seed=0), None, other)
    with pytest.raises(DataError, match=r"hidden_size=16, this base .* has 32"):
        run(trained, "exporter=vllm", f"base.path={other}", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_refused_keeps_the_others_of_its_run_from_being_written(
    tmp_path: Path, trained: list[str], base: BaseLM
) -> None:
    hydra = head_of("hydra", base)
    native.save(tmp_path / "heads" / "hydra", hydra, name="hydra")
    both = f"load=[{tmp_path}/heads/medusa,{tmp_path}/heads/hydra]"
    with pytest.raises(ConfigError, match=r"exporter=tgi: .* for hydra"):
        run(trained, both, "exporter=tgi", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_the_page_has_the_table() -> None:
    """docs/export.md names an exporter for a head exactly where the table has one."""
    page = (CONF.parent / "docs" / "export.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    start = next(n for n, row in enumerate(rows) if row[0] == "head")
    found = {}
    for row in rows[start + 2 :]:
        if row[0].strip("`") not in HEADS:
            break
        found[row[0].strip("`")] = {name for name in SERVERS if any(f"`{name}`" in cell for cell in row[1:])}
    assert found == TAKEN


def test_the_settings(base: BaseLM) -> None:
    with pytest.raises(ConfigError, match="runtime='vlm': choose one of portable, vllm"):
        RuntimeConfig("vlm")
    head = head_of("medusa", base)
    head.spec = dataclasses.replace(head.spec, path="a base's folder")
    assert option(words("tensorrt_llm", head, base), "--model_dir") == "a base's folder"
