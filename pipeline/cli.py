"""The command line: the only click, printing and exit codes. Stages are imported inside commands: --help is instant."""

from __future__ import annotations

import atexit
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

try:
    import click

    from segpipe.tasks.errors import SegpipeError, UserError
except KeyboardInterrupt:
    sys.exit("segpipe: stopped")

YAML_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
CLOSING_S = 10.0
RUN_AGAIN = "what is done is kept; run the same command again to go on"
TRAIN_AGAIN = "the last checkpoint is kept; run the same command again to go on from it"


class _Program(click.Group):
    """A group of commands that tells all that is wrong in one line: click's own errors, and Ctrl-C at any moment."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command, and end with its exit code; not standalone: return, and leave errors and signals alone."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        # Else Python would look for cycles in all that is still there when it ends, which takes up to a second.
        atexit.register(gc.freeze)
        try:
            _take_signals()
            code = super().main(args, prog_name, complete_var, False, **extra)
            _ignore_signals()
            sys.exit(code)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "segpipe"
            _end(f"{error.format_message()} See: {command} --help", error.exit_code)
        except click.ClickException as error:
            _end(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _end("stopped", 1)


def _take_signals() -> None:
    """Let SIGTERM be what Ctrl-C is, also where a script that started this with & has made Ctrl-C be ignored.

    What follows the first within CLOSING_S is ignored, so that all is closed in peace; after that it counts again,
    for the first may have come where a library swallows exceptions.
    """
    stopped_at: float | None = None

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped_at
        if stopped_at is None or time.monotonic() - stopped_at > CLOSING_S:
            stopped_at = time.monotonic()
            raise KeyboardInterrupt

    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, stop)


def _ignore_signals() -> None:
    """Nothing is left to be stopped but Python's own exit, which would tell of it in a traceback."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)


@contextmanager
def _told(debug: bool, again: str = "", as_json: bool = False) -> Iterator[None]:
    """Turn errors into one line and an exit code: 2 the user's mistake, 1 failed while running.

    again: what is kept of a command that did not end, and how to go on with it; as_json: the line is one of JSON.
    """
    again = f"; {again}" if again else ""
    try:
        yield
    except KeyboardInterrupt:
        _end(f"stopped{again}", 1, as_json)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, SegpipeError):
            _end(str(error), error.exit_code, as_json)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{error.strerror or error}{again}", 1, as_json)
        _end(f"unexpected {type(error).__name__}: {error}; --debug shows where{again}", 1, as_json)


def _end(message: str, code: int, as_json: bool = False) -> NoReturn:
    _ignore_signals()
    line = f"segpipe: {' '.join(message.split())}"
    if as_json:
        from .logs import json_line

        line = json_line("error", line, time.time(), event="end", exit_code=code)
    click.echo(line, err=True)
    sys.exit(code)


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--debug", is_flag=True, help="Show the traceback of an error.")(command)
    return click.option(
        "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Change a key of the YAML, for this run."
    )(command)


@click.group(
    "segpipe", cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="segpipe")
def main() -> None:
    """Aerial imagery to building footprints."""


@main.command()
@click.argument("city", type=YAML_FILE)
@click.option("--scheduler", metavar="ADDRESS", help="Work on a running Dask scheduler, such as tcp://host:8786.")
@click.option("--dry-run", is_flag=True, help="Print the plan, and do nothing.")
@click.option("--fresh", is_flag=True, help="Start over: delete what earlier runs have kept in the output folder.")
@click.option("--log-file", type=YAML_FILE, metavar="FILE", help="Append what is told to a FILE too.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: a line of JSON for each thing that is told, on standard error and in the log file.",
)
@click.option("--performance-report", type=YAML_FILE, metavar="FILE", help="Write Dask's page on the work to a FILE.")
@_job_options
def run(
    city: Path,
    scheduler: str | None,
    dry_run: bool,
    fresh: bool,
    log_file: Path | None,
    log_format: str,
    performance_report: Path | None,
    overrides: tuple[str, ...],
    debug: bool,
) -> None:
    """Map a city: tiles to a GeoPackage of buildings. Run it again, and it goes on where it stopped."""
    as_json = log_format == "json"
    with _told(debug, RUN_AGAIN, as_json):
        for option, given in (("--fresh", fresh), ("--scheduler", scheduler)):
            if dry_run and given:
                raise UserError(f"--dry-run only prints the plan, so {option} does nothing; expected one of the two")
        from .config import load_city, with_scheduler
        from .manifest import DROPPING, nothing_changed

        config = load_city(city, overrides)
        config = config if scheduler is None else with_scheduler(config, scheduler)
        if not (dry_run or fresh) and (manifest := nothing_changed(config)) is not None:
            if config.folder.size(DROPPING) is not None:
                from .run import finish_dropping

                finish_dropping(config)
            click.echo(
                f"nothing has changed since {manifest['finished']}: nothing to do, the results are in {config.folder}"
            )
            return
        from .allocator import spare_memory

        spare_memory()
        if dry_run:
            from .run import dry_run as plan_only

            for label, text in plan_only(config):
                click.echo(f"{label:>10}  {text}")
            return
        from .cluster_fork import forking

        with forking() if config.cluster.kind == "local" else nullcontext():
            from .logs import logging_to
            from .progress import show_summary, terminal
            from .run import map_city

            console = terminal(quiet=as_json)
            with logging_to(log_file, as_json):
                published = map_city(config, console, fresh, performance_report)
        show_summary(console, published.stages)
        click.echo(
            f"{published.buildings} buildings, {published.buildings_m2 / 1e4:.2f} ha, in"
            f" {config.folder.file(published.geopackage.name)}; report: {config.folder.file('report.html')}"
        )


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def status(run: str, debug: bool) -> None:
    """How far a RUN is: a run folder, its s3:// URL, or the city.yaml of it. Asks its store alone."""
    with _told(debug):
        from .status import status_of

        for label, text in status_of(run):
            click.echo(f"{label:>10}  {text}")


@main.command()
@click.argument("train", type=YAML_FILE)
@_job_options
def train(train: Path, overrides: tuple[str, ...], debug: bool) -> None:
    """Train a network on labelled areas; the result is a model bundle that `run` takes."""
    with _told(debug, TRAIN_AGAIN):
        from .allocator import keep_memory

        keep_memory()
        from .config import load_train
        from .train import train as fit

        fit(load_train(train, overrides))


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--truth",
    "truths",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Mask raster, folder of these, or footprints, in any CRS; once for each RUN.",
)
@click.option("--group", metavar="PATTERN", help="Pool images too by what a regular expression finds in their names.")
@click.option("--truth-id", metavar="COLUMN", help="The column of the truth's own ids.")
@click.option(
    "--output",
    type=FOLDER,
    help="The folder to write to; without it RUN/evaluation, of several or in a bucket evaluation.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate(
    runs: tuple[str, ...],
    truths: tuple[Path, ...],
    group: str | None,
    truth_id: str | None,
    output: Path | None,
    debug: bool,
) -> None:
    """Compare each RUN with the truth, by pixels and by buildings: tables, a layer for QGIS, the worst places.

    A RUN is a run folder, its s3:// URL, or the city.yaml of it.
    """
    with _told(debug):
        from .allocator import spare_memory

        spare_memory()
        from .evaluate import evaluate_to
        from .run_folder import brought, folder_of
        from .storage import LocalFolder

        places = [folder_of(run) for run in runs]
        own = places[0].path if len(runs) == 1 and isinstance(places[0], LocalFolder) else Path()
        with ExitStack() as stack:
            folders = [stack.enter_context(brought(place)) for place in places]
            for name, value in evaluate_to(output or own / "evaluation", folders, truths, group, truth_id):
                click.echo(f"{name:>20}  {value}")


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(run: str, debug: bool) -> None:
    """Prove the outputs of a RUN from themselves and its manifest; exit code 1 with the first difference.

    A RUN is a run folder, its s3:// URL, or the city.yaml of it.
    """
    with _told(debug):
        from .allocator import spare_memory

        spare_memory()
        from .run_folder import brought, folder_of
        from .verify import verify_run

        with brought(folder_of(run)) as folder:
            for name, text in verify_run(folder):
                click.echo(f"{name:>10}  {text}")


@main.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--model", required=True, metavar="BUNDLE", help="A model bundle, or the name of one in the package.")
@click.option("--output", required=True, type=FOLDER, help="The folder to write to.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Least probability of the mask; without it the bundle's.",
)
@click.option("--module", metavar="PACKAGE.MODULE:NAME", help="A network of your own, that the bundle may run.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def predict(
    images: tuple[Path, ...], model: str, output: Path, threshold: float | None, module: str | None, debug: bool
) -> None:
    """Predict single images of any kind and size.

    Each IMAGE becomes NAME_mask.png (255 and 0), NAME_probability.png (0 to 250 for 0 to 1, 255 where the image has no
    pixel) and NAME_panel.png (image | mask | image x mask). Tiles of a city are for `segpipe run`.
    """
    with _told(debug):
        from .predict import plan_predictions, predict_images

        placed = 0
        for found in predict_images(plan_predictions(images, model, output, threshold, module)):
            height, width = found.shape_yx
            placed += found.georeferenced
            click.echo(f"{found.image}: {width} x {height} px, {found.share:.1%} in the mask: {found.target.mask}")
        if placed:
            click.echo(
                f"{placed} of {len(images)} are georeferenced: for one mask over all tiles of a city, and its buildings"
                " as polygons, there is `segpipe run`"
            )


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=FOLDER)
@click.option("--output", type=FOLDER, default="compare", show_default=True, help="The folder to write to.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compare(runs: tuple[Path, ...], output: Path, debug: bool) -> None:
    """Compare trainings, the folders that `train` has written: tables, learning curves, and masks of the same crops."""
    with _told(debug):
        from .compare import compare_runs

        for line in compare_runs(runs, output):
            click.echo(line)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--to", "target", type=YAML_FILE, default="city.yaml", show_default=True, help="The file to write.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="A key that goes into the file as it is."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def init(folder: Path, target: Path, overrides: tuple[str, ...], debug: bool) -> None:
    """Look at the tiles in a FOLDER and write a commented city.yaml for them, with a picture beside it."""
    with _told(debug):
        from .describe import describe
        from .init import write_city_yaml

        for label, text in describe(write_city_yaml(folder, target, overrides)):
            click.echo(f"{label:>10}  {text}")
        click.echo(f"wrote {target} and {target.with_suffix('.png')}; to map the city: segpipe run '{target}'")


@main.command()
@click.argument("directory", type=FOLDER)
@click.option("--seed", default=7, show_default=True, help="Another seed, another city.")
@click.option("--run", "run_it", is_flag=True, help="Map the city too, and compare the result with its truth.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(directory: Path, seed: int, run_it: bool, debug: bool) -> None:
    """Draw a demonstration city into a DIRECTORY: tiles, their true footprints, and a commented city.yaml."""
    with _told(debug):
        from .demo import write_demo

        files = write_demo(directory, seed)
        click.echo(f"drew {files.buildings} buildings on {len(files.tiles)} tiles in {directory}")
        if not run_it:
            click.echo(f"to map them: segpipe run '{files.config}'")
            return
        context = click.get_current_context()
        context.invoke(run, city=files.config, debug=debug)
        context.invoke(evaluate, runs=(str(files.config.parent / "run"),), truths=(files.truth,), debug=debug)


@main.group()
def cluster() -> None:
    """Workers on other machines: check that they can work on a city."""


@cluster.command("check")
@click.argument("city", type=YAML_FILE)
@_job_options
def cluster_check(city: Path, overrides: tuple[str, ...], debug: bool) -> None:
    """Start or find the workers of a CITY, and let each of them look at tiles, weights and output: no other work."""
    with _told(debug):
        from .config import load_city
        from .run import check_cluster

        for label, text in check_cluster(load_city(city, overrides)):
            click.echo(f"{label:>10}  {text}")


@main.command()
@click.argument("kind", type=click.Choice(["city", "train"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a city.yaml or a train.yaml, for editors that complete and check."""
    with _told(False):
        from .schema import schema_text

        click.echo(schema_text(kind), nl=False)


@main.group()
def models() -> None:
    """Model bundles: list, show, import."""


@models.command("list")
def models_list() -> None:
    """The bundles that come with the package, and the networks that can be trained."""
    with _told(False):
        from segpipe.models.networks import NETWORKS
        from segpipe.models.weights import packaged_bundles, read_card

        for bundle in packaged_bundles():
            card = read_card(bundle)
            click.echo(f"{bundle.stem}: {card.architecture}, {card.resolution_m:g} m a pixel, {', '.join(card.bands)}")
        click.echo(f"networks that can be trained: {', '.join(NETWORKS)}")


@models.command("show")
@click.argument("bundle")
def models_show(bundle: str) -> None:
    """Print the card of a BUNDLE: a file, or the name of one in the package."""
    with _told(False):
        from segpipe.models.weights import read_card

        from .plan import find_model

        click.echo(read_card(find_model(bundle, Path.cwd())).model_dump_json(indent=2))


@models.command("import")
@click.argument("source", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("destination", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--architecture", required=True, help="Name of the network, for example unet11.")
def models_import(source: Path, destination: Path, architecture: str) -> None:
    """Make a bundle of a published checkpoint: an ImageNet encoder (.pth), or a TernausNet."""
    with _told(False):
        from segpipe.models.weights import BundleError, import_checkpoint

        try:
            card = import_checkpoint(source, destination, architecture)
        except BundleError as error:
            raise UserError(str(error)) from None
        click.echo(f"{destination}: {card.architecture}, halo of {card.halo_px} px")
