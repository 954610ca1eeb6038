"""What stands beside the base: a companion, a trained drafter, and the heads that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith import artifacts, config, prepare
from draftsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM
    from draftsmith.contracts import Head


class Beside:
    """The companion and the drafter of a command line, loaded when somebody asks for them."""

    def __init__(self, base: BaseLM, companion: prepare.BaseConfig | None, drafter: str | None) -> None:
        self.base, self._companion, self._drafter = base, companion, drafter
        self._loaded: dict[str, Any] = {}

    @classmethod
    def of(cls, cfg: Any, base: BaseLM) -> Beside:
        """From the keys `companion` and `drafter`."""
        companion = cfg.get("companion")
        typed = None if companion is None else config.typed(companion, prepare.BaseConfig, "companion")
        return cls(base, typed, cfg.get("drafter"))

    @property
    def companion(self) -> BaseLM | None:
        """The second language model; DataError where it has another tokenizer than the base."""
        if self._companion is not None and "companion" not in self._loaded:
            from draftsmith.data.labels import check_pair

            loaded = prepare.load_base(self._companion, str(self.base.device))
            check_pair(self.base.spec, loaded.spec)
            self._loaded["companion"] = loaded
        return self._loaded.get("companion")

    @property
    def drafter(self) -> Any:
        """Whose drafts a gate is to judge: a trained head, or the companion as a draft model; None for nobody."""
        if self._drafter is not None and self._companion is not None:
            raise ConfigError("drafter, companion: both are given; a gate judges one of them")
        return self.head if self._drafter is not None else self.draft_model

    @property
    def head(self) -> Head | None:
        """The trained drafter."""
        if self._drafter is not None and "head" not in self._loaded:
            head = checked(self._drafter, self.base)
            if head.role != "drafter":
                raise ConfigError(f"drafter: {self._drafter} is a {head.role}; give the folder of a drafter")
            self._loaded["head"] = head
        return self._loaded.get("head")

    @property
    def draft_model(self) -> Any:
        """The companion as a drafter."""
        if self.companion is None:
            return None
        from draftsmith.heads.draft_model import DraftModel

        return DraftModel(self.companion, DEPTH)

    def of_kind(self, kind: type[Head]) -> Any:
        """What a head of this kind is to be built beside."""
        return self.drafter if kind.wants == "drafter" else self.companion if kind.wants == "companion" else None

    def load(self, folder: Path | str) -> Head:
        """A head of any role from its native folder. A gate comes with its drafter: the one of the command line, else
        the one its folder names; DataError where that is not the one it was trained for."""
        head = checked(folder, self.base)
        if head.role == "gate":
            recorded = head.said["beside"]
            found = self._given(recorded) or self._recorded(recorded, folder)
            if told(found)["sha256"] != recorded.get("sha256"):
                raise DataError(
                    f"{folder}: made for the drafter {recorded.get('kind')} of {recorded.get('path')}, whose weights"
                    " are others than those given; load the one it was trained for, or train a gate for this one"
                )
            head.attach(found)
        return head

    def _given(self, recorded: Mapping[str, Any]) -> Any:
        """The drafter of the command line. A companion may be there only to be compared with."""
        return self.head or (self.draft_model if recorded.get("kind") == DRAFT_MODEL else None)

    def _recorded(self, recorded: Mapping[str, Any], folder: Path | str) -> Any:
        from draftsmith.exporters.native import DRAFTER

        path, kind = str(recorded.get("path")), recorded.get("kind")
        if (inside := Path(folder) / DRAFTER).is_dir():  # it travelled with the gate
            path = str(inside)
        if not Path(path).is_dir():
            key = "companion=hf companion.path" if kind == DRAFT_MODEL else "drafter"
            raise DataError(f"{folder}: its drafter was at {path}, where nothing is now; give {key}=…")
        if kind == DRAFT_MODEL:
            quantised = recorded.get("quantised") or None
            own = prepare.BaseConfig(path=path, dtype=str(recorded.get("dtype")), quantise=quantised)
            return Beside(self.base, own, None).draft_model
        return Beside(self.base, None, path).head


def checked(folder: Path | str, base: BaseLM) -> Head:
    """A native folder's head, after it has answered its capsule on this base; DataError where it does not."""
    from draftsmith.exporters import capsule, native

    head = native.load(folder, base.spec, device=base.device)
    if head.golden is not None:
        capsule.check(head, base, head.golden, folder)
    return head


DRAFT_MODEL = "draft_model"
DEPTH = 64  # the deepest chain of a draft model; decoding.depth and gates make shorter ones


def told(beside: Any, path: str | None = None) -> dict[str, Any]:
    """What an export says of it: enough to find it again and to refuse another. path: of a head's folder."""
    if beside is None:
        return {}
    if hasattr(beside, "state_dict"):  # a head
        sha256 = artifacts.tensors_sha256(beside.state_dict())
        return {"kind": type(beside).__name__, "path": path and str(Path(path).resolve()), "sha256": sha256}
    from draftsmith.data.labels import identity

    companion: BaseLM = getattr(beside, "companion", beside)
    kind = "companion" if companion is beside else DRAFT_MODEL
    sha256 = artifacts.fingerprint(identity(companion.spec, companion.weights_sha256()))
    dtype = str(companion.dtype).removeprefix("torch.")
    how = {"dtype": dtype, "quantised": companion.spec.quantised}
    return {"kind": kind, "path": companion.spec.path, **how, "sha256": sha256}
