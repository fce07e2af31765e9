"""logs.py: log lines stand under the name of the library they come from, above progress bars."""

import io
import logging
import subprocess
import sys

import pytest
from conftest import ROOT
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from author_dp.logs import LogFormatter, LogHandler, get_logger, replace_log_handler


@pytest.mark.parametrize("module", ["author_dp.training.saving", "data_utils", "dp_utils", "__main__"])
def test_lines_carry_the_name_of_this_project(module):
    line = logging.LogRecord(get_logger(module).name, logging.INFO, "", 0, "trained %d authors", (9,), None)
    assert LogFormatter().format(line) == "[author_dp] trained 9 authors"
    assert get_logger(module).getEffectiveLevel() == transformers_logging.get_verbosity()


def test_lines_of_transformers_keep_its_name():
    line = logging.LogRecord("transformers.trainer", logging.INFO, "", 0, "Saving", (), None)
    assert LogFormatter().format(line) == "[transformers] Saving"


def test_a_line_does_not_end_a_progress_bar():
    handler = LogHandler(stream := io.StringIO())
    with tqdm(total=3, file=stream, ncols=40, mininterval=0) as bar:
        bar.update()
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "a line", (), None))
    assert "\ra line\n" in stream.getvalue()  # at the beginning of a line, which was cleared
    assert stream.getvalue().partition("a line\n")[2].startswith("\r 33%")


def test_handlers_and_formats_of_the_user_stay():
    root, own = logging.getLogger("transformers"), logging.StreamHandler(io.StringIO())
    own.setFormatter(logging.Formatter("mine: %(message)s"))
    root.addHandler(own)
    try:
        before = list(root.handlers)
        replace_log_handler()
        assert root.handlers == before
    finally:
        root.removeHandler(own)


@pytest.mark.integration
def test_console_handler_is_replaced_once_and_can_be_disabled():
    code = (
        "import author_dp.logs as logs, importlib; importlib.reload(logs); from transformers.utils import logging;"
        "log = logs.get_logger('author_dp.x'); log.warning('one'); logging.disable_default_handler(); log.warning('two')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr.startswith("[author_dp] one\n") and done.stderr.count("[") == 1  # the second by logging's last resort
