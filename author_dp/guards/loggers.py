"""Keep the local files of loggers (--report_to) in the output directory, readable by the owner only.

Losses, clipping statistics and times in logs are private. By default, loggers write them to the current directory or the home
directory, readable by everybody. Here a logger's local files go to OUTPUT_DIR/_logs/NAME (mode 0700), or to a directory that the
user named and nobody else can read. codecarbon's emissions.csv, which holds no losses, goes to OUTPUT_DIR.

This was tested with each library listed here; other loggers are refused. Online services receive losses, too: that is the user's
choice, and the log says so.

    scratch/_logs/tensorboard, scratch/_logs/wandb, ...
"""

import os
import stat
from pathlib import Path

from transformers import TrainingArguments

from author_dp.errors import UserError
from author_dp.logs import get_logger

logger = get_logger(__name__)

LOGS_NAME = "_logs"
DISABLED = "false"
# Environment variables of each logger. {}: the logger's directory. DISABLED: else it may upload all of the output directory.
VARIABLES = {
    "clearml": {"CLEARML_CACHE_DIR": "{}", "CLEARML_LOG_MODEL": DISABLED},
    "codecarbon": {},  # emissions.csv in the output folder: durations, no losses
    "comet_ml": {"COMET_OFFLINE_DIRECTORY": "{}", "COMET_LOG_ASSETS": DISABLED},
    "mlflow": {"MLFLOW_TRACKING_URI": "sqlite:///{}/mlflow.db", "HF_MLFLOW_LOG_ARTIFACTS": DISABLED},
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{}"},
    "trackio": {"TRACKIO_DIR": "{}"},
    "wandb": {"WANDB_DIR": "{}", "WANDB_CACHE_DIR": "{}", "WANDB_DATA_DIR": "{}", "WANDB_LOG_MODEL": DISABLED},
}
_assigned: dict[str, str] = {}  # variables set by a run of this process, not by the user


def check_loggers(args: TrainingArguments) -> None:
    """Raise UserError for a logger that would let others read private losses."""
    for name in args.report_to or []:
        if name not in VARIABLES:
            remedy = "set DISABLE_KUBEFLOW_INTEGRATION=TRUE" if name == "kubeflow" else "leave it out"
            raise UserError(
                f"--report_to {name}: it is not known where this logger keeps private losses. Use one of {', '.join(VARIABLES)}, "
                f"or {remedy}"
            )
        for variable, value in VARIABLES[name].items():
            check_logger_variable(variable, value)
    for option in ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"):
        place = getattr(args, option, None) or os.environ.get(option.upper())
        if "trackio" in (args.report_to or []) and place and not args.hub_private_repo:
            raise UserError(f"--{option} {place}: it would show private losses to everybody. Add --hub_private_repo True")


def check_logger_variable(variable: str, value: str) -> None:
    """Raise UserError if the user set `variable` to a directory that others can read, or to upload files."""
    chosen = get_logger_variable(variable)
    if chosen is None:
        return
    if value == DISABLED:
        if chosen.lower() not in ("", "0", "false", "no", "off", "n", "f"):
            raise UserError(
                f"{variable}={chosen}: private files of --output_dir would be uploaded. Unset it, and upload what "
                "python -m author_dp.publish copies"
            )
    elif value.startswith("sqlite:"):
        if not chosen.startswith(("http://", "https://", "databricks")):
            raise UserError(
                f"{variable}={chosen}: private losses must stay in --output_dir. Unset it, or name a server (https://)"
            )
    elif (folder := Path(chosen).expanduser()).exists() and stat.S_IMODE(folder.stat().st_mode) & 0o077:
        raise UserError(
            f"{variable}={chosen}: others could read private losses there. Run chmod 700 on it, or unset the variable"
        )


def get_logger_variable(variable: str) -> str | None:
    """Return the value that the user set `variable` to; None if unset, or set by `redirect_loggers`."""
    value = os.environ.get(variable)
    return None if value == _assigned.get(variable) else value


def redirect_loggers(args: TrainingArguments) -> TrainingArguments:
    """Create the directories of the loggers in use, and point the loggers to them; call before they start. Return `args`."""
    used, logs = args.report_to or [], Path(str(args.output_dir)).resolve() / LOGS_NAME
    if used and args.process_index == 0:
        logs.parent.mkdir(parents=True, exist_ok=True)
    for name in {*used, "comet_ml"} if used else ():  # comet_ml, where installed, also starts with other loggers
        for variable, value in VARIABLES[name].items():
            if (chosen := get_logger_variable(variable)) is None:
                os.environ[variable] = _assigned[variable] = value.format(logs / name)
            if name in used and args.process_index == 0 and value != DISABLED and "://" not in str(chosen):
                make_private_logger_dir(logs / name if chosen is None else Path(chosen).expanduser())
    if used:
        logger.info(
            f"--report_to {' '.join(used)}: losses go to {logs}, and to these loggers' online services, if any. They are private."
        )
    return args


def make_private_logger_dir(directory: Path) -> None:
    """Create a directory and its missing parents, for the owner only."""
    for path in [*reversed(directory.parents), directory]:
        if not path.exists():
            path.mkdir(mode=0o700)
