"""The command line: ``pyro-flows fit`` for a model in a file, ``pyro-flows demo`` for eight schools."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main"]

_OK, _FAILED, _USAGE, _POOR, _INTERRUPTED = 0, 1, 2, 3, 130

# Eight schools (Rubin, 1981): effects of coaching on test scores, and their standard errors.
_EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
_ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
# Means and standard deviations of a long run of NUTS (10 chains, 10,000 draws), and the log evidence.
_REFERENCE = {
    "mu": (4.41, 3.31),
    "tau": (3.60, 3.20),
    "theta[0]": (6.15, 5.62),
    "theta[1]": (4.94, 4.65),
    "theta[2]": (3.91, 5.28),
    "theta[3]": (4.80, 4.77),
    "theta[4]": (3.61, 4.61),
    "theta[5]": (4.05, 4.80),
    "theta[6]": (6.32, 5.00),
    "theta[7]": (4.88, 5.32),
}
_REFERENCE_LOG_EVIDENCE = -31.311


class _UsageError(Exception):
    """Something about the command line or the files it names is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; those of the process when omitted.

    Returns:
        0 for a fit to use, 1 when the fit failed, 2 for bad arguments or files, 3 for a fit that the diagnostics call
        poor (its files are written all the same), 130 when interrupted.
    """
    options = _parser().parse_args(argv)
    from .errors import PyroFlowsError

    try:
        return options.run(options)
    except _UsageError as error:
        print(f"pyro-flows: {error}", file=sys.stderr)
        return _USAGE
    except PyroFlowsError as error:
        print(f"pyro-flows: {type(error).__name__}: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("pyro-flows: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-flows",
        description="Fit Pyro models with normalizing flows, and say how far to trust the fit.",
        epilog="Exit codes: 0 a fit to use; 1 the fit failed; 2 bad arguments or files; 3 a poor fit; 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="fit a model in a Python file to data in a CSV or JSON file")
    fit.add_argument("model", metavar="FILE.py:MODEL", help="file, and the name of the model in it")
    fit.add_argument("--data", type=Path, metavar="FILE", help="a CSV table, JSON records or object: its columns or keys are the model's arguments")
    fit.add_argument("--as-float", nargs="+", default=[], metavar="KEY", help="lists of whole numbers to take as floats")
    fit.add_argument("--flow", default="auto", help="name of a flow of pyro_flows.flows, 'auto' or 'none' (%(default)s)")
    fit.add_argument("--max-steps", type=int, metavar="N", help="at most so many training steps")
    fit.add_argument("--seed", type=int, default=0, help="seed of the whole run (%(default)s)")
    fit.add_argument("--samples", type=int, default=4000, metavar="N", help="draws to write (%(default)s)")
    fit.add_argument("--out", type=Path, metavar="FILE.nc", help="write draws and diagnostics, for ArviZ")
    fit.add_argument("--predictive", action="store_true", help="posterior predictive draws too")
    fit.add_argument("--plot", type=Path, metavar="FILE.png", help="write a figure")
    fit.add_argument("--save", type=Path, metavar="FILE.pt", help="write the posterior, for Posterior.load")
    fit.add_argument("--checkpoint", type=Path, metavar="FILE.pt", help="keep the state of the training here, and go on from it where it exists")
    fit.add_argument("--quiet", action="store_true", help="no progress bar")
    fit.set_defaults(run=_fit)
    demo = commands.add_parser("demo", help="fit eight schools, compare with NUTS, write eight_schools.nc and .png")
    demo.add_argument("--max-steps", type=int, metavar="N", help="at most so many training steps")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)
    return parser


def _version() -> str:
    from . import __version__

    return __version__


def _fit(options: argparse.Namespace) -> int:
    for path in (options.out, options.plot, options.save, options.checkpoint):  # better now than after the fit
        if path is not None and not path.absolute().parent.is_dir():
            raise _UsageError(f"the folder of {str(path)!r} does not exist")
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)):
            raise _UsageError(f"{str(path)!r} cannot be written")
    if not 0 <= options.seed < 2**63:
        raise _UsageError(f"--seed must be a whole number from 0 to 2**63 - 1, got {options.seed}")
    if options.samples < 1:
        raise _UsageError(f"--samples must be positive, got {options.samples}")
    if options.predictive and options.out is None:
        raise _UsageError("--predictive needs --out, the file to write to")
    model = _model(options.model)
    data = _data(options.data, model, options.as_float)
    _check_arguments(model, options.model, data)
    flow = None if options.flow == "none" else options.flow
    posterior = _run(model, data, options, flow=flow, seed=options.seed, checkpoint=options.checkpoint)
    print(posterior.summary(options.samples))
    if options.out is not None:
        posterior.to_arviz(predictive=options.predictive, num_samples=options.samples).to_netcdf(options.out)
    if options.plot is not None:
        posterior.plot(options.plot)
    if options.save is not None:
        posterior.save(options.save)
    written = [str(path) for path in (options.out, options.plot, options.save) if path is not None]
    if written:
        print(f"\nWritten: {', '.join(written)}")
    return _POOR if posterior.verdict == "poor" else _OK


def _run(model: Callable[..., Any], data: dict[str, Any], options: argparse.Namespace, **settings: Any) -> Any:
    from .errors import ConvergenceWarning
    from .vi.flow_vi import FlowVI

    if options.max_steps is not None:
        settings["max_steps"] = options.max_steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the table says so too
        return FlowVI(model, progress=not options.quiet, **settings).run(**data)


def _data(path: Path | None, model: Callable[..., Any], as_float: Sequence[str]) -> dict[str, Any]:
    from .errors import DataError
    from .model.tables import arguments_from_file

    try:
        return {} if path is None else arguments_from_file(path, model, as_float)
    except DataError as error:
        raise _UsageError(str(error)) from error


def _model(spec: str) -> Callable[..., Any]:
    file, _, name = spec.rpartition(":")
    if not file or not name:
        raise _UsageError(f"{spec!r}: write FILE.py:MODEL, such as schools.py:model")
    path = Path(file)
    if not path.is_file():
        raise _UsageError(f"there is no file {file!r}")
    spec_of_file = importlib.util.spec_from_file_location(path.stem, path)
    if spec_of_file is None or spec_of_file.loader is None:
        raise _UsageError(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec_of_file)
    sys.path.insert(0, str(path.absolute().parent))  # for what the file imports from beside itself
    try:
        spec_of_file.loader.exec_module(module)
    except Exception as error:
        raise _UsageError(f"{file!r} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    model = getattr(module, name, None)
    if not callable(model):
        models = [k for k, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        raise _UsageError(f"{file!r} has no model {name!r}; it defines {', '.join(models) or 'no function'}")
    return model


def _check_arguments(model: Callable[..., Any], spec: str, data: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**data)
    except TypeError as error:
        raise _UsageError(f"{spec} takes {signature}, the data have {sorted(data) or 'no keys'}: {error}") from error


def _eight_schools(y: Any, sigma: Any) -> None:
    """The centred model: a funnel, which defeats mean-field guides."""
    import pyro
    import pyro.distributions as dist

    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def _demo(options: argparse.Namespace) -> int:
    import torch

    print("Eight schools, centred: y[j] ~ N(theta[j], sigma[j]), theta[j] ~ N(mu, tau), mu ~ N(0, 5), tau ~ HalfCauchy(5)")
    data = {"y": torch.tensor(_EFFECTS), "sigma": torch.tensor(_ERRORS)}
    posterior = _run(_eight_schools, data, options)
    posterior.to_arviz().to_netcdf("eight_schools.nc")
    posterior.plot("eight_schools.png")
    summary = posterior.summary(10_000)
    print(f"\n{summary.attrs['header']}\n")
    print(f"{'':10}{'mean':>8}{'NUTS':>8}{'sd':>8}{'NUTS':>8}   difference of means / sd")
    for name, (mean, sd) in _REFERENCE.items():
        row = summary.loc[name]
        off = (row["mean"] - mean) / sd
        print(f"{name:10}{row['mean']:8.2f}{mean:8.2f}{row['sd']:8.2f}{sd:8.2f}   {off:+.3f}")
    print(f"\nlog evidence {posterior.log_evidence}, known value {_REFERENCE_LOG_EVIDENCE}")
    print("Written: eight_schools.nc (arviz.from_netcdf reads it) and eight_schools.png")
    return _POOR if posterior.verdict == "poor" else _OK


if __name__ == "__main__":
    sys.exit(main())
