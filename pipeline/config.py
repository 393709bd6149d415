"""The only YAML: city.yaml and train.yaml as frozen values. Unknown keys are refused with the nearest known one."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from segpipe.tasks.bucket import Storage
from segpipe.tasks.errors import UserError
from segpipe.tasks.files import is_remote

from .storage import Folder, folder_at


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_tuple_of_any(value: object) -> object:
    return value if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a null character")
    try:
        os.fsencode(Path(text).expanduser())
    except RuntimeError:
        raise ValueError("names a home folder that is not there") from None
    except UnicodeEncodeError:
        raise ValueError("holds characters that no file name can have") from None
    return text


def _check_local(text: str) -> str:
    if "://" in text:
        raise ValueError("is no folder of this machine")
    return text


def _check_output(text: str) -> str:
    if "://" in text and not re.fullmatch(r"s3://[\w.-]+(/[^/]+)+/?", text):
        raise ValueError("is no folder in a bucket")
    return text


Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(_check_path)]
Paths = Annotated[
    tuple[PathText, ...],
    BeforeValidator(_as_tuple_of_any, json_schema_input_type=Text | tuple[Text, ...]),
    Field(min_length=1),
]
Numbers = Annotated[
    tuple[float, ...], BeforeValidator(_as_tuple_of_any, json_schema_input_type=float | tuple[float, ...])
]
BandNumbers = Annotated[
    tuple[PositiveInt, ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1, description="a list of band numbers from 1, such as [1, 2, 3]"),
]
BandNames = Annotated[
    tuple[PositiveInt | Text, ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1, description="a list of band numbers from 1, such as [1, 2, 3], or of colours"),
]
Limits = Annotated[tuple[float, float], BeforeValidator(_as_tuple)]
Bounds = Annotated[tuple[float, float, float, float], BeforeValidator(_as_tuple)]
NODATA = "null, a number, or a list of numbers such as [0, 255]"


class _Section(BaseModel):
    """Part of a YAML file. Each field's description is what a user is told to be expected there."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class GridConfig(_Section):
    """The lattice and how it is cut. crs null: of most tiles; resolution_m null: theirs, or the model's if coarser."""

    crs: str | None = Field(None, description="null, or a projected CRS such as EPSG:32633")
    chunk_px: int = Field(1024, ge=64, le=8192, description="a whole number of pixels from 64 to 8192")
    block_px: PositiveInt | Auto = Field("auto", description="auto, or a whole number of pixels such as 2048")
    resolution_m: float | None = Field(None, gt=0, description="null, or ground metres of a pixel such as 0.3")
    sparse: bool = Field(False, description="true or false")
    area: PathText | Bounds | None = Field(
        None, description="null, a vector file such as district.gpkg, or [xmin, ymin, xmax, ymax]"
    )


class PredictConfig(_Section):
    """How the network is run."""

    halo: Annotated[int, Field(ge=0)] | Literal["auto", "exact"] = Field(
        "auto", description="auto, exact, or a whole number of pixels from 0"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    tta: Literal["none", "d4"] = Field("none", description="none or d4")


class VectorizeConfig(_Section):
    """From probabilities to footprints; metres are ground metres. threshold null: the bundle's."""

    threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="null, or a number above 0 and up to 1 such as 0.4"
    )
    min_area_m2: NotNegative = Field(10.0, description="a number of square metres from 0 on")
    fill_holes_m2: NotNegative = Field(2.0, description="a number of square metres from 0 on")
    simplify_m: NotNegative = Field(0.3, description="a number of metres from 0 on")
    regularize: Literal["none", "orthogonal"] = Field("none", description="none or orthogonal")
    regularize_min_iou: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="a number above 0 and up to 1 such as 0.8"
    )


Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s*(GiB|GB|MiB|MB)$")]
Lines = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple_of_any, json_schema_input_type=Text | tuple[Text, ...])]


TLS = "null, or the PEM files {ca: …, cert: …, key: …}"


class TlsConfig(_Section):
    """What the driver shows to a scheduler, and what it takes the scheduler's certificate for: PEM files."""

    ca: PathText = Field(description="a PEM file with the certificate of the authority")
    cert: PathText = Field(description="a PEM file with this side's certificate")
    key: PathText = Field(description="a PEM file with this side's key")


class GroupConfig(_Section):
    """Jobs of one kind of a batch system, and the workers in each. cores and memory are of a whole job."""

    count: PositiveInt = Field(1, description="a whole number of jobs from 1")
    processes: PositiveInt = Field(1, description="a whole number of workers in each job from 1")
    cores: PositiveInt = Field(description="a whole number of cores of each job such as 8")
    memory: Memory = Field(description="a number with GiB, GB, MiB or MB for each job such as 32 GiB")
    walltime: Text = Field("01:00:00", description="a time as sbatch takes it such as 01:00:00")
    queue: Text | None = Field(None, description="null, or the name of a partition")
    account: Text | None = Field(None, description="null, or the name of an account")
    directives: Lines = Field((), description="a list of what sbatch is to be told besides such as [--gres=gpu:1]")
    prologue: Lines = Field((), description="a list of lines of shell that come before the worker")
    device: Text | Auto = Field("auto", description="auto, or the device in a recipe such as cuda sm_90")


KINDS = "local, scheduler, slurm or class"
THREADS = "auto, or a whole number from 1 such as 2"


class LocalConfig(_Section):
    """Worker processes of this machine. threads: of torch in each; memory: of all workers together."""

    kind: Literal["local"] = Field("local", description=KINDS)
    workers: PositiveInt | Auto = Field("auto", description=THREADS)
    threads: PositiveInt | Auto = Field("auto", description=THREADS)
    memory: Memory | Auto = Field("auto", description="auto, or a number with GiB, GB, MiB or MB such as 8 GiB")


class SchedulerConfig(_Section):
    """A Dask scheduler that runs already, with its workers."""

    kind: Literal["scheduler"] = Field(description=KINDS)
    address: Annotated[str, Field(pattern=r"^\w+://.+$")] | None = Field(
        None, description="null, or tcp://host:8786 or tls://host:8786"
    )
    scheduler_file: PathText | None = Field(None, description="null, or the JSON file that a scheduler has written")
    tls: TlsConfig | None = Field(None, description=TLS)
    threads: PositiveInt | Auto = Field("auto", description=THREADS)

    @model_validator(mode="after")
    def _one_of_two(self) -> SchedulerConfig:
        if (self.address is None) == (self.scheduler_file is None):
            raise ValueError("names not exactly one of address and scheduler_file")
        return self


class SlurmConfig(_Section):
    """Jobs of SLURM that join a scheduler in this process. Without jobs with GPUs, those without predict."""

    kind: Literal["slurm"] = Field(description=KINDS)
    cpu: GroupConfig | None = Field(None, description="null, or jobs such as {count: 4, cores: 8, memory: 32 GiB}")
    gpu: GroupConfig | None = Field(None, description="null, or jobs such as {count: 2, cores: 8, memory: 64 GiB}")
    interface: Text | None = Field(None, description="null, or the network interface of the scheduler such as ib0")
    log_directory: PathText | None = Field(None, description="null, or a folder for what the jobs print")
    tls: TlsConfig | None = Field(None, description=TLS)
    threads: PositiveInt | Auto = Field("auto", description=THREADS)

    @model_validator(mode="after")
    def _some(self) -> SlurmConfig:
        if self.cpu is None and self.gpu is None:
            raise ValueError("has neither cpu nor gpu")
        return self


class ClassConfig(_Section):
    """Any subclass of distributed's Cluster; it is imported, and so run, because the YAML names it."""

    kind: Literal["class"] = Field(description=KINDS)
    class_: Annotated[str, Field(pattern=r"^\w+(\.\w+)+$")] = Field(
        alias="class", description="package.module.Name of a subclass of distributed's Cluster"
    )
    kwargs: dict[str, JsonValue] = Field({}, description="arguments of the class such as {n_workers: 2}")
    workers: PositiveInt | None = Field(None, description="null, or how many workers it is to be scaled to such as 8")
    tls: TlsConfig | None = Field(None, description=TLS)
    threads: PositiveInt | Auto = Field("auto", description=THREADS)
    wait_s: PositiveInt = Field(600, description="a whole number of seconds from 1")


def _kind_of(value: object) -> str:
    """Which section a cluster is; what is none of them is told of as the first."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in ("scheduler", "slurm", "class") else "local"


ClusterConfig = Annotated[
    Annotated[LocalConfig, Tag("local")]
    | Annotated[SchedulerConfig, Tag("scheduler")]
    | Annotated[SlurmConfig, Tag("slurm")]
    | Annotated[ClassConfig, Tag("class")],
    Discriminator(_kind_of),
]


class StoreConfig(_Section):
    """What stays of the store after publishing."""

    keep: Literal["all", "probability", "none"] = Field("all", description="all, probability or none")


class StorageConfig(_Section):
    """Where buckets are, where that is not Amazon. Keys are never here: the environment or the cloud has them."""

    endpoint: Annotated[str, Field(pattern=r"^https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?/?$")] | None = Field(
        None, description="null, or the address of an S3 server such as https://minio.example.org:9000"
    )
    region: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = Field(None, description="null, or a region's name")
    anonymous: bool = Field(False, description="true (requests go unsigned, for public buckets) or false")


class PublishConfig(_Section):
    """What is published besides footprints and rasters of the whole city."""

    tile_masks: bool = Field(False, description="true or false")


class OutputsConfig(_Section):
    """Vector formats besides the GeoPackage, and the CRS of their files; null: the grid's, which the GeoPackage has."""

    formats: Annotated[
        tuple[Literal["geoparquet", "flatgeobuf", "filegdb", "geojson"], ...], BeforeValidator(_as_tuple)
    ] = Field((), description="a list of some of geoparquet, flatgeobuf, filegdb, geojson")
    crs: Text | None = Field(None, description="null, or a coordinate system such as EPSG:4326")


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
        """The whole configuration as YAML, with its defaults and absolute paths: it says the same in any folder."""
        values = self.model_dump(mode="json", by_alias=True) | self._absolute_paths()
        return as_yaml(values)

    @abstractmethod
    def _absolute_paths(self) -> dict[str, Any]:
        """Those values of the configuration that are paths, made absolute."""

    def _absolute(self, texts: Sequence[str]) -> list[str]:
        return [text if is_remote(text) else str(self.path(text)) for text in texts]


class CityConfig(_Job):
    """city.yaml: which tiles, which model, where to."""

    name: Text = Field(description="a text such as vienna")
    images: Paths = Field(
        description="a glob such as tiles/*.tif, a folder, a VRT, a URL, STAC in JSON, or a list of these"
    )
    asset: Text | None = Field(None, description="null, or the name of an asset of STAC items such as visual")
    model: PathText = Field(
        description="the file of a model bundle, one in a bucket, or the name of one in the package"
    )
    output: Annotated[PathText, AfterValidator(_check_output)] = Field(
        description="a folder such as runs/vienna, or one in a bucket such as s3://bucket/vienna"
    )
    module: Text | None = Field(None, description="null, or package.module:name of your own network, which is then run")
    bands: BandNames = (1, 2, 3)
    scale: Limits | Auto | None = Field(None, description="null, auto, or two sample values such as [0, 2047]")
    images_crs: Text | None = Field(None, description="null, or a coordinate system such as EPSG:32633")
    nodata: Numbers | None = Field(None, description=NODATA)
    nodata_tolerance: NotNegative | Auto = Field("auto", description="auto, or a number from 0 on such as 12")
    nodata_min_m2: NotNegative = Field(1000.0, description="a number of square metres from 0 on")
    on_tile_error: Literal["fail", "skip"] = Field("fail", description="fail or skip")
    grid: GridConfig = Field(GridConfig(), description="keys and values such as {chunk_px: 1024}")
    predict: PredictConfig = Field(PredictConfig(), description="keys and values such as {halo: auto}")
    vectorize: VectorizeConfig = Field(VectorizeConfig(), description="keys and values such as {threshold: 0.4}")
    cluster: ClusterConfig = Field(LocalConfig(), description="keys and values such as {workers: 2}")
    publish: PublishConfig = Field(PublishConfig(), description="keys and values such as {tile_masks: true}")
    outputs: OutputsConfig = Field(
        OutputsConfig(), description="keys and values such as {formats: [geoparquet], crs: EPSG:4326}"
    )
    store: StoreConfig = Field(StoreConfig(), description="keys and values such as {keep: all}")
    storage: StorageConfig = Field(StorageConfig(), description="keys and values such as {region: eu-central-1}")

    @property
    def folder(self) -> Folder:
        """`output`: the run folder."""
        return folder_at(self.output if is_remote(self.output) else self.path(self.output))

    def find_buckets(self) -> Storage:
        """Let this process find buckets where `storage` says, and return that, for other processes to do the same."""
        found = Storage(**self.storage.model_dump())
        found.use()
        return found

    def _absolute_paths(self) -> dict[str, Any]:
        # A name that is no file is that of a bundle in the package.
        model = self.path(self.model)
        return {
            "images": self._absolute(self.images),
            "model": str(model) if model.is_file() else self.model,
            "output": str(self.folder),
            "cluster": self._absolute_cluster(),
            "grid": self.grid.model_dump(mode="json")
            | ({"area": str(self.area)} if isinstance(self.area, Path) else {}),
        }

    def _absolute_cluster(self) -> dict[str, Any]:
        values = self.cluster.model_dump(mode="json", by_alias=True)
        for name in ("scheduler_file", "log_directory"):
            if values.get(name) is not None:
                values[name] = str(self.path(values[name]))
        if values.get("tls") is not None:
            values["tls"] = {part: str(self.path(path)) for part, path in values["tls"].items()}
        return values

    @property
    def area(self) -> Path | tuple[float, float, float, float] | None:
        """`grid.area`: the path of a vector file, or bounds."""
        return self.path(self.grid.area) if isinstance(self.grid.area, str) else self.grid.area


def with_scheduler(config: CityConfig, address: str) -> CityConfig:
    """The same city on a running scheduler, with the certificates and threads that its YAML names."""
    tls = getattr(config.cluster, "tls", None)
    cluster = SchedulerConfig(kind="scheduler", address=address, tls=tls, threads=config.cluster.threads)
    return config.model_copy(update={"cluster": cluster})


Value = Annotated[int, Field(ge=0, le=255)]
Values = Annotated[
    tuple[Value, ...], BeforeValidator(_as_tuple_of_any, json_schema_input_type=Value | tuple[Value, ...])
]
Share = Annotated[float, Field(gt=0, lt=1)]
Part = PositiveInt | Share | Annotated[tuple[Text, ...], BeforeValidator(_as_tuple), Field(min_length=1)] | PathText
PART = "a share such as 0.05, a number such as 738, a list of names, or a text file with a name a line"
SizeYX = Annotated[
    tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]],
    BeforeValidator(_as_tuple),
]
Arguments = dict[str, JsonValue]


class MaskConfig(_Section):
    """What the values of a mask mean. A value that is in none of the lists is refused."""

    foreground: Values | None = Field(None, description="null (all but background), or a list of values such as [255]")
    background: Values | None = Field(None, description="null, or a list of values such as [0]")
    ignore: Values = Field((), description="a list of values whose pixels are left out, such as [3]")


class AreaConfig(MaskConfig):
    """Images and the labels of the same places."""

    images: Paths = Field(description="a glob such as train/*_image.tif, a file, or a list of these")
    labels: Paths = Field(description="a glob such as train/*_mask.tif, a file, or a list of these")
    area: PathText | None = Field(None, description="null, or a vector file of where the labels are complete")
    images_crs: Text | None = Field(None, description="null, or a coordinate system such as EPSG:32633")
    nodata: Numbers | None = Field(None, description=NODATA)
    weight: float = Field(1.0, gt=0, description="a number above 0: how often crops come from here")


class PairsConfig(MaskConfig):
    """Images without a place on the Earth, each with its mask: found by a pattern in which {stem} is its name."""

    images: Paths = Field(description="a glob such as images/*.jpg, a folder, or a list of these")
    masks: PathText = Field(description="a pattern such as annotations/trimaps/{stem}.png")
    resize_px: SizeYX | None = Field(None, description="null, or height and width such as [256, 256]")
    resolution_m: float | None = Field(None, gt=0, description="null, or metres of a pixel such as 0.3")
    draw: Literal["once", "replacement"] = Field("once", description="once (each in every epoch) or replacement")


class SplitConfig(_Section):
    """Which part of the areas or pairs validates, and which is only measured at the end; drawn by seed."""

    by: Literal["area", "tile", "block"] = Field("area", description="area, tile or block")
    # The names are those of the lists of areas.
    validate_part: Part | None = Field(None, alias="validate", description=f"null, {PART}")
    test: Part | None = Field(None, description=f"null, {PART}")
    seed: int = Field(0, ge=0, description="a whole number from 0")
    block_px: int = Field(1024, ge=64, description="a whole number of pixels from 64")
    gap_px: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="auto (the network's halo), or a whole number of pixels from 0"
    )


class NetworkConfig(_Section):
    """The network and what its weights start from."""

    name: Text = Field(description="the name of a network such as unet-mobilenetv2, or package.module:name")
    args: Arguments = Field({}, description="keys and values such as {decoder: plain}")
    initialisation: PathText = Field(
        "lecun", description="lecun, default, a name such as vgg11-imagenet, a file of weights, or a model bundle"
    )
    freeze_encoder: bool = Field(False, description="true or false")
    frozen_statistics: bool | Auto = Field(
        "auto", description="auto (true for weights that were trained), true or false"
    )


class FitConfig(_Section):
    """The optimisation. An epoch is steps_per_epoch batches; auto: all pairs once, or all valid pixels covered once."""

    epochs: PositiveInt = Field(20, description="a whole number from 1")
    steps_per_epoch: PositiveInt | Auto = Field("auto", description="auto, or a whole number from 1 such as 100")
    crop_px: int = Field(768, ge=64, description="a whole number of pixels from 64")
    validate_px: Annotated[int, Field(ge=64)] | Literal["all"] = Field(
        "all", description="all, or the side of the central crop of each tile such as 1440"
    )
    batch: PositiveInt = Field(8, description="a whole number from 1")
    optimiser: Literal["adam", "adamw", "rmsprop", "sgd"] = Field("adam", description="adam, adamw, rmsprop or sgd")
    learning_rate: float = Field(0.001, gt=0, description="a number above 0 such as 0.001")
    encoder_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="null, or a number above 0 such as 0.0003"
    )
    momentum: float = Field(0.0, ge=0, lt=1, description="a number from 0 and below 1 such as 0.9")
    alpha: float = Field(0.99, gt=0, lt=1, description="a number between 0 and 1 such as 0.9")
    eps: float | None = Field(None, gt=0, description="null, or a number above 0 such as 1.0e-7")
    weight_decay: NotNegative = Field(0.0, description="a number from 0 on such as 0.0001")
    schedule: Literal["constant", "cosine", "one-cycle"] = Field(
        "constant", description="constant, cosine or one-cycle"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="a whole number from 0")
    accumulate: PositiveInt = Field(1, description="a whole number from 1")
    clip_norm: float | None = Field(None, gt=0, description="null, or a number above 0 such as 5")
    average: Literal["none", "ema", "swa"] = Field("none", description="none, ema or swa")
    loss: Text = Field(
        "bce-jaccard", description="bce-jaccard, bce, dice, dice-bce, or package.module:name of your own"
    )
    args: Arguments = Field({}, description="arguments of the loss such as {jaccard: pixel}")
    best_by: Literal["iou", "dice", "soft_dice", "loss"] = Field("iou", description="iou, dice, soft_dice or loss")
    patience: PositiveInt | None = Field(None, description="null, or a whole number of epochs such as 10")
    precision: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    loaders: Annotated[int, Field(ge=0)] | Auto = Field("auto", description="auto, or a whole number of processes")
    devices: PositiveInt = Field(1, description="a whole number from 1")
    nodes: PositiveInt = Field(1, description="a whole number from 1")
    seed: int = Field(0, ge=0, description="a whole number from 0")


class StatisticsConfig(_Section):
    """Mean and standard deviation of each band, of values from 0 to 1."""

    mean: Numbers = Field(description="a list of numbers such as [0.485, 0.456, 0.406]")
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_tuple_of_any)] = Field(
        description="a list of numbers such as [0.229, 0.224, 0.225]"
    )


Areas = Annotated[
    tuple[AreaConfig, ...],
    BeforeValidator(_as_tuple),
]
AREAS = "a list such as [{images: train/*_image.tif, labels: train/*_mask.tif}]"


class TrainConfig(_Job):
    """train.yaml: labelled areas, a network, where to."""

    name: Text = Field(description="a text such as buildings")
    areas: Areas = Field((), description=AREAS)
    inria: PathText | None = Field(None, description="null, or the folder of the Inria data set")
    pairs: PairsConfig | None = Field(
        None, description="null, or keys and values such as {images: images/*.jpg, masks: 'masks/{stem}.png'}"
    )
    validate_on: Areas = Field((), alias="validate", description=AREAS)
    test_on: Areas = Field((), alias="test", description=AREAS)
    split: SplitConfig = Field(SplitConfig(), description="keys and values such as {by: tile, validate: 0.2}")
    network: NetworkConfig = Field(description="keys and values such as {name: unet-mobilenetv2}")
    normalisation: Literal["imagenet", "unit", "statistics"] | StatisticsConfig = Field(
        "imagenet",
        description="imagenet, unit (x/255), statistics, or {mean: [...], std: [...]}",
    )
    augment: Literal["standard", "none"] | Arguments = Field(
        "standard", description="standard, none, or keys and values such as {scale: [0.7, 1.4], holes: 0}"
    )
    fit: FitConfig = Field(FitConfig(), description="keys and values such as {epochs: 20}")
    calibrate: Literal["temperature", "none"] = Field("temperature", description="temperature or none")
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="null (the best on the validating part), or a number between 0 and 1 such as 0.3"
    )
    effective_halo: Literal["measure", "exact"] = Field("measure", description="measure or exact")
    readers: PositiveInt | Auto = Field("auto", description="auto, or a whole number of processes from 1")
    output: Annotated[PathText, AfterValidator(_check_local)] = Field(description="a folder such as runs/buildings")
    bands: BandNumbers = (1, 2, 3)

    def deciding(self) -> dict[str, Any]:
        """All values, with absolute paths, but those that change nothing of what comes out of the training."""
        values = self.model_dump(mode="json", by_alias=True) | self._absolute_paths()
        del values["readers"], values["fit"]["loaders"]
        return values

    def _absolute_paths(self) -> dict[str, Any]:
        def absolute(areas: tuple[AreaConfig, ...]) -> list[dict[str, Any]]:
            return [
                area.model_dump(mode="json")
                | {"images": self._absolute(area.images), "labels": self._absolute(area.labels)}
                | ({"area": str(self.path(area.area))} if area.area is not None else {})
                for area in areas
            ]

        start = self.path(self.network.initialisation)
        values: dict[str, Any] = {
            "areas": absolute(self.areas),
            "validate": absolute(self.validate_on),
            "test": absolute(self.test_on),
            # A name that is no file is that of an initialisation or of a bundle in the package.
            "network": self.network.model_dump(mode="json")
            | ({"initialisation": str(start)} if start.is_file() or start.suffix else {}),
            "split": self.split.model_dump(mode="json", by_alias=True)
            | {
                name: str(self.path(part))
                for name, part in (("validate", self.split.validate_part), ("test", self.split.test))
                if isinstance(part, str)
            },
            "output": str(self.path(self.output)),
        }
        if self.inria is not None:
            values["inria"] = str(self.path(self.inria))
        if self.pairs is not None:
            values["pairs"] = self.pairs.model_dump(mode="json") | {
                "images": self._absolute(self.pairs.images),
                "masks": str(self.path(self.pairs.masks)),
            }
        return values


JobT = TypeVar("JobT", bound=_Job)


def as_yaml(values: dict[str, Any]) -> str:
    """Keys and values as the text of a YAML file, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_city(file: Path, overrides: Sequence[str] = ()) -> CityConfig:
    """Read city.yaml. overrides: `key.path=value` texts that win over the file. UserError for anything wrong in it."""
    return _load(CityConfig, file, overrides)


def load_train(file: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read train.yaml. overrides: `key.path=value` texts that win over the file. UserError for anything wrong in it."""
    return _load(TrainConfig, file, overrides)


def _load(kind: type[JobT], file: Path, overrides: Sequence[str]) -> JobT:
    data = _read(file)
    of_file = copy.deepcopy(data)
    for text in overrides:
        override(data, text)
    try:
        job = kind.model_validate(data)
    except ValidationError as error:
        raise UserError("; ".join(_explain(kind, error, file, of_file, data, overrides))) from None
    job._file = file
    return job


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of equal keys; YAML itself has none."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (same := (key.tag, key.value)) in lines:
                    problem = f"found the key {key.value} again, which is in line {lines[same]} too; expected it once"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                lines[same] = key.start_mark.line + 1
        return node


def _read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}; expected a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: cannot be read: it is no text; expected a YAML file") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{file}: not YAML{where}: {problem}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not YAML: {error}") from None
    if not isinstance(data, dict):
        found = "nothing" if data is None else "a list" if isinstance(data, list) else _shown(data)
        raise UserError(f"{file}: found {found}; expected keys and values such as `output: run`, a line each")
    return data


def override(data: dict[str, Any], text: str) -> None:
    """Put a `key.path=value` text into the keys and values of a YAML file. UserError where it is none."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: expected key.path=value, for example vectorize.threshold=0.4")
    try:
        parsed = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"--set {text}: the value is not YAML") from None
    *path, last = key.split(".")
    for part in path:
        if not isinstance(data.setdefault(part, {}), dict):
            raise UserError(f"--set {text}: {part} has no keys below it")
        data = data[part]
    data[last] = parsed


Key = tuple[str | int, ...]
"""A place in a YAML file: keys, and positions in lists of sections."""


def _explain(
    kind: type[BaseModel],
    error: ValidationError,
    file: Path,
    of_file: dict[str, Any],
    data: dict[str, Any],
    overrides: Sequence[str],
) -> Iterator[str]:
    """One text a faulty key, headed by the file or the --set that it comes from.

    of_file: what the file holds; data: the same with the overrides.
    """
    faults: dict[Key, str] = {}
    for entry in error.errors():
        unknown = entry["type"] in ("extra_forbidden", "invalid_key")
        key, field, known = _place(kind, (*entry["loc"][:-1], str(entry["loc"][-1])) if unknown else entry["loc"])
        if unknown:
            near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
            faults[key] = f"unknown key; {hint}"
        elif entry["type"] == "missing":
            faults[key] = f"missing; expected {_expected(field)}"
        elif entry["type"] == "value_error":
            faults[key] = f"{_shown(_at(data, key))} {entry['ctx']['error']}; expected {_expected(field)}"
        else:
            faults.setdefault(key, f"found {_shown(_at(data, key))}; expected {_expected(field)}")
    for key, fault in faults.items():
        # What is wrong inside of a section makes the section wrong too: told once.
        if not any(other != key and other[: len(key)] == key for other in faults):
            yield f"{_source(key, file, of_file, data, overrides)}: {'.'.join(map(str, key))}: {fault}"


def _source(key: Key, file: Path, of_file: dict[str, Any], data: dict[str, Any], overrides: Sequence[str]) -> str:
    """Where the value at a key comes from: the last --set that has to do with it, or the file."""
    if repr(_at(of_file, key)) != repr(_at(data, key)):
        for text in reversed(overrides):
            changed = tuple(text.partition("=")[0].split("."))
            shared = min(len(changed), len(key))
            if changed[:shared] == tuple(map(str, key[:shared])):
                return f"--set {text}"
    return str(file)


def _at(value: Any, key: Key) -> Any:
    """The value at a key; `...` where there is none."""
    for part in key:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return ...
    return value


def _shown(value: object) -> str:
    """A value as a user may have written it, not too long."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _place(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[Key, FieldInfo | None, list[str]]:
    """The key of an error, its field if there is one, and the keys that are known beside it.

    pydantic adds names of types to its places, and positions of single values in lists: a user is told of the list.
    """
    key: Key = ()
    field: FieldInfo | None = None
    section: type[BaseModel] | None = kind
    known = _keys(kind)
    position: Key = ()
    for part in loc:
        if isinstance(part, int):
            position = (part,)
        elif field is not None and part in (kinds := _kinds_of(field.annotation)):
            section = kinds[part]
            known = _keys(section)
        elif section is not None:
            known = _keys(section)
            key, position = (*key, *position, part), ()
            field = next((f for name, f in section.model_fields.items() if part == (f.alias or name)), None)
            section = _section_of(field.annotation) if field is not None else None
    return key, field, known


def _expected(field: FieldInfo | None) -> str:
    return field.description or "another value" if field is not None else "another value"


def _keys(kind: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in kind.model_fields.items()]


def _kinds_of(annotation: object) -> dict[str, type[BaseModel]]:
    """Sections of which a key may hold one or another, by the tag that pydantic puts into its places."""
    tags = [part.tag for part in get_args(annotation) if isinstance(part, Tag)]
    if tags:
        return {tags[0]: get_args(annotation)[0]}
    return {tag: kind for part in get_args(annotation) for tag, kind in _kinds_of(part).items()}


def _section_of(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_of(part)) is not None), None)
