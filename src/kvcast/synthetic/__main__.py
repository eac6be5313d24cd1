"""`python -m kvcast.synthetic`: print a request (`client/request.json` is user 1's), or write many, or a log."""

import argparse
import importlib.util
import sys
from pathlib import Path

from kvcast.protocol.config import DEFAULT_CONFIG, ModelConfig, load_config
from kvcast.protocol.log import LABEL
from kvcast.protocol.manifest import Manifest, parse_manifest
from kvcast.protocol.request import RankRequest
from kvcast.protocol.schema import FeatureSchema, Workload
from kvcast.synthetic.generator import ClickLog
from kvcast.synthetic.perf_input import write_perf_input
from kvcast.synthetic.shop import Shop
from kvcast.synthetic.truth import Habits, PlantedLog, compute_best_auc
from kvcast.synthetic.visitor import draw_visitor


def main(argv: list[str] | None = None) -> int:
    """Print one request as JSON, or write requests or a log; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="kvcast clicklog",
        description="Print a synthetic ranking request as JSON, write many for perf_analyzer, or a log to train on.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", default=DEFAULT_CONFIG, help="whose schema and workload (%(default)s)")
    source.add_argument("--manifest", type=Path, metavar="FILE", help="manifest.json of an exported model, instead")
    parser.add_argument("--seed", type=int, default=0)
    request = parser.add_argument_group("a request")
    request.add_argument("--history", type=int, metavar="L", help="events (the configuration's workload)")
    request.add_argument("--candidates", type=int, metavar="N", help="candidates (the configuration's workload)")
    ways = request.add_mutually_exclusive_group()
    ways.add_argument(
        "--user", type=int, metavar="NUMBER", help="of this user of the log below, when they come once more (anybody)"
    )
    ways.add_argument(
        "--perf-input", type=Path, metavar="FILE", help="write requests here, for perf_analyzer's --input-data"
    )
    request.add_argument("--requests", type=_count, default=100, help="in that file, a user each (%(default)s)")
    _add_log_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.log is not None and arguments.perf_input is not None:
        parser.error("expected --log or --perf-input, got both")
    manifest = arguments.manifest
    config = load_config(arguments.config) if manifest is None else parse_manifest(manifest.read_text())
    try:
        if arguments.log is not None:
            return _write_log(arguments, config.schema)
        if arguments.perf_input is not None:
            return _write_perf_input(arguments, config)
        print(_draw_request(arguments, config).to_json(config.schema), end="")
    except ValueError as error:
        parser.error(str(error))
    return 0


def _add_log_options(parser: argparse.ArgumentParser) -> None:
    usual = Habits()
    log = parser.add_argument_group("a log with known truth")
    log.add_argument("--log", type=Path, metavar="FILE", help="write it here: *.parquet or *.csv")
    log.add_argument("--users", type=_count, default=usual.users, help="(%(default)s)")
    log.add_argument("--days", type=_positive, default=usual.days, help="(%(default)s)")
    log.add_argument("--visits-a-day", type=_positive, default=usual.visits_a_day, help="of a user (%(default)s)")
    log.add_argument("--shown", type=_count, default=usual.shown, help="items of a visit (%(default)s)")
    log.add_argument("--shop-seed", type=int, default=0, help="the same for logs about the same items (%(default)s)")
    log.add_argument("--items", type=_count, help="(the vocabulary's)")
    log.add_argument("--categories", type=_count, default=24, help="(%(default)s)")
    log.add_argument("--with-truth", action="store_true", help="add the true probabilities as a column")


def _read_sizes(arguments: argparse.Namespace, workload: Workload) -> tuple[int, int]:
    """Return L and N."""
    return (
        workload.history if arguments.history is None else arguments.history,
        workload.candidates if arguments.candidates is None else arguments.candidates,
    )


def _write_perf_input(arguments: argparse.Namespace, config: ModelConfig | Manifest) -> int:
    log = ClickLog(config.schema, arguments.seed)
    history, count = _read_sizes(arguments, config.workload)
    requests = [log.draw_request(history, count) for _ in range(arguments.requests)]
    write_perf_input(requests, arguments.perf_input)
    print(f"{arguments.perf_input}: {len(requests)} users, {history} events and {count} candidates each")
    return 0


def _draw_request(arguments: argparse.Namespace, config: ModelConfig | Manifest) -> RankRequest:
    history, count = _read_sizes(arguments, config.workload)
    if arguments.user is None:
        return ClickLog(config.schema, arguments.seed).draw_request(history, count)
    return draw_visitor(_make_log(arguments, config.schema), arguments.user, history, count).request


def _make_log(arguments: argparse.Namespace, schema: FeatureSchema) -> PlantedLog:
    shop = Shop(schema, arguments.shop_seed, arguments.items, arguments.categories)
    habits = Habits(arguments.users, arguments.days, arguments.visits_a_day, arguments.shown)
    return PlantedLog(shop, habits, arguments.seed)


def _write_log(arguments: argparse.Namespace, schema: FeatureSchema) -> int:
    if importlib.util.find_spec("pyarrow") is None:
        print("kvcast clicklog: pyarrow is not installed: pip install 'kvcast[train]'", file=sys.stderr)
        return 1
    if arguments.log.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{arguments.log}: expected a file *.parquet or *.csv")
    log = _make_log(arguments, schema)
    rows = log.draw_rows()
    rows.write(arguments.log, with_truth=arguments.with_truth)
    labels = rows.columns[LABEL]
    print(
        f"{arguments.log}: {len(labels)} rows of {log.habits.users} users, {labels.mean():.1%} clicked; "
        f"ranking by the true probability has an AUC of {compute_best_auc(rows.truth):.4f}"
    )
    return 0


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
