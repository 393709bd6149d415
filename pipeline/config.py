"""The only YAML: city.yaml and train.yaml as frozen values. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from segpipe.tasks.errors import UserError


def _as_list(value: object) -> object:
    return value if isinstance(value, list | tuple) or value is None else [value]


Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GridConfig(_Section):
    """The lattice and how it is cut."""

    crs: None = None
    chunk_px: Annotated[int, Field(ge=64, le=8192)] = 1024
    block_px: PositiveInt | Auto = "auto"
    resolution_m: None = None
    area: None = None


class PredictConfig(_Section):
    """How the network is run."""

    halo: Annotated[int, Field(ge=0)] | Literal["auto", "exact"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    tta: Literal["none"] = "none"


class VectorizeConfig(_Section):
    """From probabilities to footprints; metres are ground metres. threshold null: the bundle's."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    min_area_m2: Annotated[float, Field(ge=0)] = 10.0
    fill_holes_m2: Annotated[float, Field(ge=0)] = 2.0
    simplify_m: Annotated[float, Field(ge=0)] = 0.3
    regularize: Literal["none"] = "none"


class ClusterConfig(_Section):
    """Where the work runs. workers: processes; threads: of torch in each; memory: of all workers together."""

    kind: Literal["local"] = "local"
    workers: PositiveInt | Auto = "auto"
    threads: PositiveInt | Auto = "auto"
    memory: Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*(GiB|GB|MiB|MB)$")] | Auto = "auto"


class StoreConfig(_Section):
    """What stays of the store after publishing."""

    keep: Literal["all", "probability", "none"] = "all"


class _Job(_Section):
    """A YAML file as a value; paths in it are relative to the file's folder."""

    _file: Path = PrivateAttr(default=Path("city.yaml"))

    @property
    def file(self) -> Path:
        """The YAML file that this was read from."""
        return self._file

    def path(self, text: str) -> Path:
        """A path of the file: relative ones are relative to the YAML file."""
        return self._file.parent.absolute() / Path(text).expanduser()

    def resolved_yaml(self) -> str:
        """The whole configuration with its defaults, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class CityConfig(_Job):
    """city.yaml: which tiles, which model, where to."""

    name: Annotated[str, Field(min_length=1)]
    images: Strings
    asset: str | None = None
    model: str
    output: str
    bands: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3)
    images_crs: str | None = None
    nodata: Annotated[tuple[float, ...], BeforeValidator(_as_list)] | None = None
    nodata_tolerance: Annotated[float, Field(ge=0)] | Auto = "auto"
    nodata_min_m2: Annotated[float, Field(ge=0)] = 1000.0
    on_tile_error: Literal["fail", "skip"] = "fail"
    grid: GridConfig = GridConfig()
    predict: PredictConfig = PredictConfig()
    vectorize: VectorizeConfig = VectorizeConfig()
    cluster: ClusterConfig = ClusterConfig()
    store: StoreConfig = StoreConfig()


class AreaConfig(_Section):
    """Images and the labels of the same places, matched in natural order."""

    images: Strings
    labels: Strings
    nodata: Annotated[tuple[float, ...], BeforeValidator(_as_list)] | None = None


class NetworkConfig(_Section):
    """The network and what its weights start from: `lecun`, a file of encoder weights, or a bundle."""

    name: str
    initialisation: str = "lecun"
    freeze_encoder: bool = False


class FitConfig(_Section):
    """The optimisation. An epoch is steps_per_epoch batches; auto: as many crops as cover all valid pixels once."""

    epochs: PositiveInt = 20
    steps_per_epoch: PositiveInt | Auto = "auto"
    crop_px: Annotated[int, Field(ge=64)] = 768
    batch: PositiveInt = 8
    optimiser: Literal["adam", "adamw"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    encoder_learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    loss: Literal["bce-jaccard"] = "bce-jaccard"
    seed: int = 0


class TrainConfig(_Job):
    """train.yaml: labelled areas, a network, where to."""

    name: Annotated[str, Field(min_length=1)]
    areas: Annotated[tuple[AreaConfig, ...], Field(min_length=1)]
    validate_on: Annotated[tuple[AreaConfig, ...], Field(min_length=1, alias="validate")]
    network: NetworkConfig
    fit: FitConfig = FitConfig()
    output: str
    bands: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 3)


JobT = TypeVar("JobT", bound=_Job)


def load_city(file: Path, overrides: Sequence[str] = ()) -> CityConfig:
    """Read city.yaml. overrides: `key.path=value` texts that win over the file. UserError for anything wrong in it."""
    return _load(CityConfig, file, overrides)


def load_train(file: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read train.yaml. overrides: `key.path=value` texts that win over the file. UserError for anything wrong in it."""
    return _load(TrainConfig, file, overrides)


def _load(kind: type[JobT], file: Path, overrides: Sequence[str]) -> JobT:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}; expected a YAML file") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{file}: not YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{file}: found {found}, expected a mapping of keys such as name, images, model, output")
    for override in overrides:
        _override(data, override)
    try:
        job = kind.model_validate(data)
    except ValidationError as error:
        raise UserError("; ".join(f"{file}: {line}" for line in _explain(kind, error))) from None
    job._file = file
    return job


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: expected key.path=value, for example vectorize.threshold=0.4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {text}: the value is not YAML") from None
    *path, last = key.split(".")
    for part in path:
        if not isinstance(data.setdefault(part, {}), dict):
            raise UserError(f"--set {text}: {part} is no mapping in the file")
        data = data[part]
    data[last] = parsed


def _explain(kind: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """One line a faulty key; the alternatives of a union are told as one."""
    seen: dict[str, list[str]] = {}
    for entry in error.errors():
        known, path = _known_path(kind, entry["loc"])
        key = ".".join(path) or "the file"
        if entry["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            seen.setdefault(key, []).append(f"unknown key; {hint}")
        elif entry["type"] == "missing":
            seen.setdefault(key, []).append("missing; it is required")
        else:
            found = json.dumps(entry["input"], default=str, ensure_ascii=False)
            message = entry["msg"][0].lower() + entry["msg"][1:]
            seen.setdefault(key, [f"found {found}, "]).append(message)
    for key, parts in seen.items():
        head, *rest = parts
        yield f"{key}: {head}" + " or ".join(dict.fromkeys(rest)) if rest else f"{key}: {head}"


def _known_path(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """Keys known at the place of an error, and the place as a user would write it (pydantic adds names of types)."""
    path: list[str] = []
    section: type[BaseModel] | None = kind
    known = _keys(kind)
    for part in loc:
        if isinstance(part, int):
            path.append(str(part))
            continue
        if section is None:
            continue
        known = _keys(section)
        path.append(part)
        field = next((f for name, f in section.model_fields.items() if part in (name, f.alias)), None)
        section = _section_of(field.annotation) if field is not None else None
    return known, path


def _keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of(part)) is not None), None)
