"""What an erasure method gives: a change that can be kept, carried and applied."""

import json
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.atomic import write_text
from overpaint.policy.parts import Pipeline, network_of
from overpaint.text_files import read_json_object

from .changes import KINDS, Change, WeightChange
from .concept import Concept

RECORD_FILE = "erasure.json"
RECORD_FORMAT = "overpaint.Erasure/3"
READ_FORMATS = (RECORD_FORMAT, "overpaint.Erasure/2")
"""The older one has infinity as Python's `json` writes it, which is no JSON."""

FLOAT = "float"
"""Key of the object that stands for a number which JSON has no word for."""


def is_saved(path: str | Path) -> bool:
    """Returns whether `Erasure.save` wrote a folder."""
    return (Path(path).expanduser() / RECORD_FILE).is_file()


def as_json(value: Any) -> Any:
    """Returns settings as JSON has them: infinity becomes an object, `{"float": "inf"}`, and arrays become lists."""
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    if hasattr(value, "tolist"):  # NumPy's and torch's
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [as_json(one) for one in value]
    return {FLOAT: str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """Returns the settings that `as_json` made JSON of."""
    if isinstance(value, dict):
        if value.keys() == {FLOAT} and value[FLOAT] in ("inf", "-inf", "nan"):
            return float(value[FLOAT])
        return {name: from_json(one) for name, one in value.items()}
    return [from_json(one) for one in value] if isinstance(value, list) else value


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """A concept, erased by a method with certain settings: what changes in the model, and how that came about.

    Several can be applied to one model, one after the other, as long as each was computed from the model as the ones
    before left it, or changes nothing that they changed.
    """

    method: str
    config: dict[str, Any]
    """The method's settings as JSON knows them, strength included."""
    concept: Concept
    change: Change
    base: str | None = None
    """Hash of the weights that it was computed from; None where any will do."""

    @property
    def delta(self) -> WeightDelta:
        """The differences of the UNet's weights; a `ValueError` where the method changes none."""
        if not isinstance(self.change, WeightChange):
            raise ValueError(f"an erasure's delta is that of its weights, and {self.method} changes none")
        return self.change.delta

    @classmethod
    def of(
        cls, policy: DiffusionPolicy, method: str, config: dict[str, Any], concept: Concept, change: Change
    ) -> "Erasure":
        """Returns the erasure that a method computed from a policy as it is; tuples among its settings become lists."""
        plain = json.loads(json.dumps(config))
        return cls(method=method, config=plain, concept=concept, change=change, base=change.base(policy.model))

    @classmethod
    def from_official(
        cls, path: str | Path, *, base: DiffusionPolicy | Pipeline, concept: Concept, method: str | None = None
    ) -> "Erasure":
        """Reads an erased model that others have released; see `erasure.official.official_erasure`."""
        from .official import official_erasure

        return official_erasure(path, base=base, concept=concept, method=method)

    @classmethod
    def between(
        cls,
        original: DiffusionPolicy | Pipeline,
        erased: DiffusionPolicy | Pipeline,
        concept: Concept,
        method: str = "none",
    ) -> "Erasure":
        """Returns what leads from a model to an erased one; see `erasure.official.erasure_between`."""
        from .official import erasure_between

        return erasure_between(original, erased, concept, method)

    def apply(
        self,
        policy: DiffusionPolicy,
        *,
        check_base: bool = True,
        reference: Literal["erased", "original"] = "erased",
    ) -> None:
        """Changes a policy in place, before training. A LoRA stays on top.

        Args:
            policy: What is changed.
            check_base: Whether to refuse a policy whose weights are not those that the erasure was computed from.
            reference: Which model the policy's reference is from then on: the erased one, which training starts from,
                or the one before, which the loss of an erasure method is about. A guard is at work in either.

        Raises:
            ValueError: It has other parameters or other weights, or what it already has cannot be combined with this;
                nothing is changed then.
        """
        if check_base:
            self._check_base(policy)
        before = self.change.original(policy.model) if reference == "original" else {}
        self.change.apply(policy)
        if before:
            policy.remember_reference(before)

    def apply_to_pipeline(self, pipeline: Pipeline, *, check_base: bool = True) -> None:
        """Changes a plain diffusers pipeline in place; arguments and errors as in `apply`."""
        if check_base:
            self._check_base(pipeline)
        self.change.apply_to_pipeline(pipeline)

    @contextmanager
    def applied(self, policy: DiffusionPolicy) -> Generator[None]:
        """Changes a policy for the length of a `with` block, then makes it what it was, to the bit.

        For measuring: the reference policy is not touched, and the policy's weights may be any.
        """
        with self.change.applied(policy):
            yield

    def save(self, folder: str | Path) -> None:
        """Writes tensors as safetensors and everything else as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.change.save(folder)
        record = {
            "format": RECORD_FORMAT,
            "method": self.method,
            "kind": self.change.kind,
            "config": as_json(self.config),
            "concept": self.concept.to_json(),
            "base": self.base,
        }
        write_text(folder / RECORD_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "Erasure":
        """Reads what `save` wrote.

        Raises:
            ValueError: The folder holds no erasure, or one of another format.
        """
        path = Path(folder) / RECORD_FILE
        if not path.is_file():
            raise ValueError(f"an erasure's folder must hold {RECORD_FILE}, and {folder} does not")
        record = read_json_object(path)
        if record.get("format") not in READ_FORMATS:
            raise ValueError(f"{path} must be of format {RECORD_FORMAT!r}, got {record.get('format')!r}")
        kinds = {"method": str, "kind": str, "config": dict, "concept": dict, "base": str | None}
        for name, kind in kinds.items():
            if name not in record or not isinstance(record[name], kind):
                raise ValueError(f"{path} must hold {name}, as an erasure is saved, got {record.get(name)!r}")
        if record["kind"] not in KINDS:
            raise ValueError(
                f"the kind of a change must be one of {', '.join(KINDS)}, got {record['kind']!r} in {path}"
            )
        try:
            concept = Concept.from_json(record["concept"])
        except ValueError as error:
            raise ValueError(f"{path} must hold a concept: {error}") from error
        try:
            config = from_json(record["config"])
        except RecursionError as error:
            raise ValueError(f"{path} must hold settings of few levels, got more than Python follows") from error
        return cls(
            method=record["method"],
            config=config,
            concept=concept,
            change=KINDS[record["kind"]].load(Path(folder)),
            base=record["base"],
        )

    def _check_base(self, model: DiffusionPolicy | Pipeline) -> None:
        found = self.change.base(network_of(model))
        if self.base is not None and found != self.base:
            raise ValueError(
                f"the model must have the weights that {self.method} erased {self.concept.name!r} from (SHA-256 "
                f"{self.base[:12]}), got others ({(found or 'none')[:12]}); another precision is another one. "
                "To apply it all the same, pass check_base=False"
            )
