"""The command line of every script: compose, check, hand over to Hydra, and say in one line what is wrong.

A script ends with `if __name__ == "__main__": command("train", main)` and imports torch inside `main`, so
that a misspelt key is refused before torch is loaded. What a config may hold lives in `composition.py`.
"""

import argparse
import functools
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig

from conf.schema import ROOTS, as_run_keys
from runtime.composition import CONF, check_values, compose, compose_sweep, implied, leave_out, unchosen
from runtime.texts import read_texts

TRACEBACK = "SCENOGRAPH_TRACEBACK"  # set to 1: a refusal shows its traceback too
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def command(config_name: str, run: Callable[[DictConfig], None]) -> None:
    """Runs a script with the configuration that its command line asks for.

    Hydra's flags work as ever: `--help`, `--cfg job`, `--info`, `-m` with any launcher. A mistake of the
    caller (a ValueError of the project, a file that is not there) ends the process with status 2 and one line
    on stderr, and any other exception keeps its traceback.

    Args:
        config_name: Which root of `conf/` the script reads.
        run: What the script does with the checked configuration.
    """
    # Hydra would print its own traceback and exit with 1; with this it lets errors through.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = [_open_as_run(_in_quotes(argument), config_name) for argument in sys.argv[1:]]
        arguments = get_args_parser().parse_args()
        for override in implied(config_name, arguments.overrides, config_dir=arguments.config_dir):
            sys.argv.insert(sys.argv.index(arguments.overrides[0]), override)  # overrides have to stay together
        _check(config_name, arguments)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(_as_job(run))()
    except Exception as error:
        refuse(error)
        raise error.with_traceback(_below_hydra(error.__traceback__)) from error.__cause__


def refuse(error: Exception) -> None:
    """Ends the process with one line on stderr and status 2 where the error is a mistake of the caller.

    Args:
        error: What was raised; any other error is left to the caller of this function.
    """
    message = explanation(error)
    if message is None:
        return
    if os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def explanation(error: BaseException) -> str | None:
    """One line for a mistake of the caller, None for any other error.

    A mistake of the caller is a ValueError that the project itself raises, an OSError that names a file, or
    what Hydra cannot read. The same errors from inside a library are more likely a defect, whose traceback is
    needed.

    Args:
        error: What was raised; an error behind Hydra's instantiation counts as itself.

    Returns:
        The line, without the script's name.
    """
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    is_ours = isinstance(error, ValueError | OSError) and not _raised_in_library(error.__traceback__)
    is_hydras = isinstance(error, HydraException) and not isinstance(error, InstantiationException)
    return " ".join(str(error).split()) if is_ours or is_hydras else None


def _check(config_name: str, arguments: argparse.Namespace) -> None:
    """Refuses what the composition refuses, as far as the flags ask for one."""
    if arguments.config_path is not None:
        raise ValueError("--config-path: the configs lie beside the scripts; add a folder of yours with --config-dir")
    if arguments.hydra_help or arguments.shell_completion or arguments.info or arguments.experimental_rerun:
        return
    name = arguments.config_name or config_name
    if arguments.multirun or "hydra.mode=MULTIRUN" in arguments.overrides:
        compose_sweep(name, arguments.overrides, config_dir=arguments.config_dir)
    else:
        shows_only = arguments.help or arguments.cfg is not None
        compose(name, arguments.overrides, config_dir=arguments.config_dir, complete=not shows_only)


def _as_job(run: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """What Hydra runs once for each job."""

    @functools.wraps(run)  # Hydra names the job after the function's file
    def job(cfg: DictConfig) -> None:
        try:
            for line in leave_out(cfg, unchosen(cfg)):
                print(line)
            check_values(cfg)  # in a sweep the check before the first job has not seen every combination
            read_texts(cfg)
            run(cfg)
        except Exception as error:
            # In a sweep the launcher reports, from whichever process the job ran in.
            if HydraConfig.get().mode != RunMode.MULTIRUN:
                refuse(error)
            raise

    return job


def _in_quotes(argument: str) -> str:
    """Quotes a value with characters that Hydra reads only in quotes, such as the letters of a path beyond ASCII."""
    key, equals, value = argument.partition("=")
    if not equals or value.isascii() or value.startswith(("'", '"', "[", "{")):
        return argument
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def _open_as_run(argument: str, config_name: str) -> str:
    """Lets an override reach below a key that is null for "as the run": `a.b=1` becomes `++a.b=1`.

    Which keys there are only the run knows: `run_directory.load_run_config` compares.
    """
    is_below = re.match(r"(\w+)\.[\w.]+=", argument)
    return f"++{argument}" if is_below and is_below[1] in as_run_keys(ROOTS.get(config_name)) else argument


def _raised_in_library(trace: TracebackType | None) -> bool:
    """Whether the innermost frame belongs to Python or an installed package."""
    frames = list(traceback.walk_tb(trace))
    file = frames[-1][0].f_code.co_filename if frames else ""
    return file.startswith((*LIBRARIES, "<frozen"))


def _below_hydra(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the job on, without Hydra's frames above it."""
    frame = trace
    while frame is not None:
        if frame.tb_frame.f_code.co_name == "run_job":
            return frame.tb_next
        frame = frame.tb_next
    return trace
