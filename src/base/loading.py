"""Reading a model and its tokenizer from a folder or a hub id, with nothing left to chance.

What lies there is somebody else's. Weights are read from safetensors only, code that comes with them runs only where
trust_remote_code asks for it, and whatever transformers raises at a file that is not what it should be is a DataError.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from draftsmith.artifacts import read_json
from draftsmith.base.families import paths_of
from draftsmith.errors import ConfigError, DataError, DraftsmithError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
INDEX, ADAPTER = "model.safetensors.index.json", "adapter_config.json"

# What a file that was written by nobody's `save_pretrained` makes transformers, or a package that it asks, raise.
REFUSALS = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
    pickle.UnpicklingError,
    StrictDataclassError,
)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings; errors still come through."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read(
    path: str, revision: str | None, dtype: str, trust_remote_code: bool, blocks: int | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer or None), every weight of the model read from the checkpoint or a DataError. blocks: only its
    first ones."""
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError(f"base.dtype: '{dtype}' is none of {', '.join(DTYPES)}")
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _loading(path):
        refuse_files(path, revision)
        config = _config(path, source)
        if blocks is not None:
            config.num_hidden_layers = blocks
            if getattr(config, "layer_types", None):
                config.layer_types = list(config.layer_types)[:blocks]
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=paths_of(config).attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that `info` names them; they are refused below
            output_loading_info=True,
            **source,
        )
    model, info = loaded
    _refuse_gaps(path, info)
    return model, _read_tokenizer(path, source)


def outline_of(path: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """(model on the meta device, tokenizer or None): everything but the weights, which are not read."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _loading(path), torch.device("meta"):
        config = _config(path, source)
        # Said here, or the config.json decides: it may name compiled code of a repository.
        how = {"attn_implementation": paths_of(config).attention, "trust_remote_code": trust_remote_code}
        model = AutoModelForCausalLM.from_config(config, **how)
    with _loading(path), suppress(OSError):  # it may come without one: then the model's config has the last word
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    return model, _read_tokenizer(path, source)


def _config(path: str, source: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **source)
    paths_of(config)  # a family we do not know is refused before anything large is read
    return config


def refuse_files(path: str, revision: str | None) -> None:
    """DataError for what transformers would follow to elsewhere: shards that are no safetensors of this place (pickles,
    or paths), and an adapter beside the weights, which names another base to load instead."""
    if index := found(path, INDEX, revision):
        told = read_json(index)
        shards = told.get("weight_map") if isinstance(told, dict) else None
        for name in sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else [""]:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise DataError(f"base: {path}/{INDEX}: lists {name!r} as weights; only safetensors beside it are read")
    if found(path, ADAPTER, revision):
        raise DataError(
            f"base: {path} holds an adapter ({ADAPTER}), not a base; give the base it was made for, and this folder as"
            " base.adapter"
        )


def found(path: str, name: str, revision: str | None) -> Path | None:
    """A file of the folder, or of the hub's repository; None where there is none."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    with suppress(OSError):  # who asks the hub next says what is wrong with it
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)
    return None


@contextmanager
def _loading(path: str) -> Iterator[None]:
    """transformers' refusals as one line that names the base."""
    import safetensors

    if Path(path).is_absolute() and not Path(path).is_dir():
        raise DataError(f"base: {path} is no folder; give a saved model's folder or a hub id")
    with quiet():
        try:
            yield
        except DraftsmithError:
            raise
        except (*REFUSALS, safetensors.SafetensorError) as error:
            where = path if Path(path).is_dir() else f"{path} (no folder of that name here, so taken as a hub id)"
            raise DataError(f"base: {where} does not load as a causal language model: {_line(error)}") from error


def _refuse_gaps(path: str, info: dict[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    for what, names in (("lacks weights", missing), ("has weights of another shape", mismatched)):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise DataError(f"base: {path} {what} that its config.json asks for: {shown}")
    if info["error_msgs"]:
        raise DataError(f"base: {path} does not load: {_line(info['error_msgs'][0])}")


def _read_tokenizer(path: str, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(path, **source)
    except REFUSALS as error:
        if not folder.is_dir() and isinstance(error, OSError | ValueError):
            return None  # a hub id without a tokenizer: whoever needs one says so
        raise DataError(f"base: the tokenizer in {path} does not load: {_line(error)}") from error


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]
