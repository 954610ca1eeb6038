"""Bad command lines, as a user types them; <rows> is a file of sound rows."""

from __future__ import annotations

from pathlib import Path

from .bad_kinds import Bad, World


def typed(line: str, says: str, verb: str = "train", code: int = 2) -> Bad:
    """These overrides, behind those that would do."""

    def make(own: Path, world: World) -> list[str]:
        return line.replace("<rows>", str(world.folder / "rows.jsonl")).split()

    return Bad(f"`{verb} {line}`", code, says, make, verb, command=True)


CONFIGS = [
    typed("trainer.max_stesp=3", "trainer.max_stesp: no such key; did you mean 'trainer.max_steps'?"),
    typed("max_steps=3", "max_steps: no such key; did you mean 'trainer.max_steps'?"),
    typed("+trainer.max_stesp=3", "trainer.max_stesp: no such key; did you mean 'max_steps'?"),
    typed("+colour=3", "colour: no such key"),
    typed("trainre=cpu", "trainre: no such key; did you mean 'trainer'?"),
    typed("head=[medsa]", "head: no such choice 'medsa'; did you mean 'medusa'?; there are …"),
    typed("experiment=quikstart", "experiment: no such choice 'quikstart'; did you mean 'quickstart'?; there are …"),
    typed("head=[]", "head: nothing to train; choose at least one, e.g. head=[medusa]"),
    typed("trainer.max_steps=many", "trainer.max_steps: Value 'many' of type 'str' could not be converted to Integer"),
    typed("trainer.max_steps=2.5", "trainer.max_steps: Value '2.5' of type 'float' could not be converted to Integer"),
    typed("trainer.max_steps=-1", "trainer: max_steps=-1: give at least 1"),
    typed("trainer.max_steps=0", "trainer: max_steps=0: give at least 1"),
    typed("trainer.max_steps=null", "trainer: max_steps, epochs: give one of them…"),
    typed(
        "trainer.max_steps=1 trainer.epochs=1",
        "trainer: max_steps, epochs: give one of them; set the other to null, as trainer.epochs=null",
    ),
    typed("trainer.epochs=nan trainer.max_steps=null", "trainer.epochs: give a number that is finite"),
    typed("trainer=3", "trainer=3: no such choice; there are cpu, gpu"),
    typed("trainer=null", "trainer=null: no such choice; there are cpu, gpu"),
    typed("data=null", "data=null: no such choice; there are default, …"),
    typed("data.validation=null", "data.validation: null; give its keys, or leave it out for the defaults"),
    typed("data.path=null", "data: path, sources, prompts, random: give one of them, not none; …"),
    typed(
        "data.path=<rows> +data.sources.a.path=<rows>",
        "data: path, sources, prompts, random: give one of them, not path and sources; …",
    ),
    typed("data.length=0", "data: length=0: give at least 1"),
    typed("data.batch_size=-2", "data: batch_size=-2: give at least 1"),
    typed("data.num_workers=-1", "data: num_workers=-1: give at least 0"),
    typed("data.validation.share=1.5", "data.validation: share, every: a share is at least 0 and below 1, …"),
    typed("data.on_bad=ignore", "data: on_bad='ignore': choose one of error, skip"),
    typed("data.on_bad=[skip]", "data.on_bad: Cannot convert 'ListConfig' to string: '['skip']'"),
    typed("optimizer.lr=-1", "optimizer: lr=-1.0: give a positive number"),
    typed("optimizer.lr=nan", "optimizer.lr: give a number that is finite"),
    typed("optimizer.lr=fast", "optimizer.lr: Value 'fast' of type 'str' could not be converted to Float"),
    typed("heads.medusa.num_heads=0", "heads.medusa: num_heads=0: give at least 1"),
    typed(
        "heads.medusa.loss_weights=[1,2]", "heads.medusa: loss_weights: 2 weights for num_heads=3; give one per head"
    ),
    typed("heads.medusa._target_=os.system", "heads.medusa._target_: 'os.system' is not allowed; …"),
    typed("seed=one", "seed='one': give an integer"),
    typed("start_from=folder", "start_from=folder: say which head, as start_from={medusa: folder}"),
    typed("start_from.hydra=folder", "start_from.hydra: no such key; did you mean 'start_from'?"),
    typed("base.dtype=int3", "base: dtype='int3': choose float32, bfloat16, float16 or float64"),
    typed("base.path=null", "base: path, recipe: give one of them; a base to load, or how to make one"),
    typed(
        "base.path=/nowhere/at/all",
        "base: /nowhere/at/all is no folder; give a saved model's folder or a hub id",
        code=3,
    ),
    typed("base=nosuch", "base: no such choice 'nosuch'; there are …"),
    typed("trainer.max_steps=${nowhere}", "trainer.max_steps: Interpolation key 'nowhere' not found"),
    typed("data.path=${data.path}", "data.path: Recursive interpolation detected"),
    typed("trainer.max_steps", "trainer.max_steps: no override that Hydra can read (…); write key=value, in quotes"),
    typed("=3", "=3: no override that Hydra can read (…); write key=value"),
    typed(
        "trainer.max_steps=[1", "trainer.max_steps=[1: no override that Hydra can read (…); write key=value, in quotes"
    ),
    typed(
        "trainer.max_steps=many run_dir=grid -m",
        "trainer.max_steps: Value 'many' of type 'str' could not be converted to Integer",
    ),
    typed("trainer.max_steps=1,2", "Ambiguous value for argument 'trainer.max_steps=1,2'…"),
    typed("out=store", "rows: must be given, as rows=…", "capture"),
    typed(
        "out=rows data.prompts=null", "data: path, sources, prompts, random: give one of them, not none; …", "distill"
    ),
    typed(
        "out=rows data.generation.engine=server data.generation.server.urls=[https://me:pass@host/v1]",
        "data.generation.server…: holds …password…",
        "distill",
    ),
    typed(
        "out=rows data.generation.engine=server data.generation.server.urls=[ftp://host/v1]",
        "data.generation.server: urls[0]='ftp://host/v1': write it like http://127.0.0.1:8000/v1",
        "distill",
    ),
    typed(
        "out=rows data.generation.temperature=-1",
        "data.generation: temperature, top_p: temperature cannot be negative, …",
        "distill",
    ),
    typed("out=rows data.prompts.synthetic=-1", "data.prompts: synthetic, text: counts cannot be negative", "distill"),
    typed(
        "run_dir=run decoding.temperature=-1",
        "decoding: temperature=-1.0: give 0 for greedy decoding, or a positive number",
        "evaluate",
    ),
    typed("run_dir=run repeats=0", "evaluate: repeats=0: give at least 1", "evaluate"),
    typed("run_dir=run tree=bonsai", "tree: no such choice 'bonsai'; …there are …", "evaluate"),
    typed("load=[here/a,there/a]", "load: the folders' names name the heads; …", "export"),
    typed("run_dir=run exporter=gguf", "exporter: no such choice 'gguf'; …there are …", "export"),
]
