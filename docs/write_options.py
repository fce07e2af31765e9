"""Write docs/options.md from the help texts of the options: python docs/write_options.py

A test fails where the page is out of date.
"""

import dataclasses
import runpy
import sys
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Which options are there, what do they mean, and what are their defaults? `python docs/write_options.py` writes this page from the
options' help texts.

Hugging Face's `TrainingArguments` work beside these, but for those that are refused or have no effect
([at the end of this page](#options-of-hugging-faces-trainingarguments)). An error that you can fix ends with status 2, and a line
that names the option and the fix. (Under `torch.distributed.run` the launcher adds its own report, and its own status 1.)

`--config FILE` reads options from a YAML file. Options on the command line override it.
"""


def default_of(field: dataclasses.Field) -> str:
    """Return the default as a user would write it."""
    value: Any = field.default
    if value is dataclasses.MISSING or value is None:
        return "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def table(group: type, names: set[str]) -> str:
    """Return one table: the options of `group` that are in `names`."""
    rows = []
    for field in dataclasses.fields(group):
        if field.name in names:
            choices = field.metadata.get("choices")
            text = field.metadata["help"].replace("|", "\\|")
            if choices and field.name != "log_level":
                text += f" One of: {', '.join(choices)}."
            if aliases := field.metadata.get("aliases"):
                text += f" Also `{aliases[-1]}`."
            rows.append(f"| `--{field.name}` | {text} | {default_of(field)} |")
    title = (group.__doc__ or "").strip().splitlines()[0]
    return "\n".join([f"## {group.__name__}", "", title, "", "| option | meaning | default |", "|---|---|---|", *rows])


def trainer_options() -> str:
    """Return the table of Hugging Face's options that are refused or have no effect."""
    from author_dp.guards.trainer_arguments import NO_EFFECT, REFUSED_OPTIONS

    rows = [f"| `--{name}` | refused | {reason} |" for name, reason in sorted(REFUSED_OPTIONS.items())]
    rows += [f"| `--{name}` | no effect | {reason} |" for name, reason in sorted(NO_EFFECT.items())]
    head = (
        "## Options of Hugging Face's TrainingArguments\n\nThose that are not in this table work, with the values that\n"
        "[verification.md](verification.md#refused-options) does not name. An option that a later transformers adds is refused.\n"
        "`--fsdp full_shard` works."
    )
    return "\n".join([head, "", "| option | here | reason |", "|---|---|---|", *rows])


def page() -> str:
    """Return what docs/options.md is to hold."""
    script = runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="options")
    known = {f.name: (default_of(f), f.metadata.get("help")) for f in dataclasses.fields(transformers.TrainingArguments)}
    tables = []
    for group in script["GROUPS"]:
        fields = dataclasses.fields(group)
        ours = {f.name for f in fields if known.get(f.name) != (default_of(f), f.metadata.get("help"))}
        tables.append(table(group, ours))
    return HEAD + "\n" + "\n\n".join([*tables, trainer_options()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
