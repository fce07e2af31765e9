"""Compare what a model learns from synthetic text and from as much real text, by its evaluation loss on held-out authors.

    python benchmarks/synthetic_utility.py synthetic.jsonl comments.jsonl --model_name gpt2 --sequence_len 128

The files are those of author_dp.synthetic_report, and so are the options that describe them. All other options are passed to
fine-tune-dp.py, which trains twice without privacy (--disable_dp), from the same model, with the same number of texts and steps.
The held-out authors are those of the training. All results are computed on private data: do not publish them.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from author_dp.outputs.page import STATISTICS_NAME  # noqa: E402
from author_dp.outputs.privacy_statement import check_statement  # noqa: E402
from author_dp.outputs.synthetic_report import add_options, read_real, read_synthetic, split  # noqa: E402

OPTIONS = ["--disable_dp", "--save_strategy", "no", "--log_level", "warning", "--disable_tqdm", "True"]


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"author": author, "content": text}) + "\n" for author, text in rows), encoding="utf-8")
    return path


def fine_tune(train_file: Path, validation_file: Path, output_dir: Path, options: list[str]) -> dict[str, dict[str, float]]:
    """Train on a file without privacy; return the metrics of the evaluations before and after."""
    files = ["--train_file", str(train_file), "--validation_file", str(validation_file), "--output_dir", str(output_dir)]
    command = [sys.executable, str(ROOT / "fine-tune-dp.py"), *files, *OPTIONS, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((output_dir / STATISTICS_NAME).read_text(encoding="utf-8"))["evaluation"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("synthetic", type=Path, help="a file that author_dp.generate wrote")
    parser.add_argument("files", nargs="+", help="the --train_file of the training")
    parser.add_argument("--text_column", default="content")
    parser.add_argument("--messages_column")
    add_options(parser)
    args, options = parser.parse_known_args()
    model = check_statement(args.synthetic).get("model") or {}
    training, held_out = split(read_real("FILE", args.files, args), model, args)
    texts = {"synthetic": read_synthetic(args.synthetic, args.text_column), "real": [row.text for row in training]}
    number = min(map(len, texts.values()))
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        held_out_file = write_rows(Path(folder) / "held_out.jsonl", [(f"held out: {row.author}", row.text) for row in held_out])
        for name, rows in texts.items():
            sample = random.Random(0).sample(rows, number)
            # Synthetic texts have no author: each text counts as one, on both sides.
            train_file = write_rows(Path(folder) / f"{name}.jsonl", [(f"text {i}", text) for i, text in enumerate(sample)])
            metrics[name] = fine_tune(train_file, held_out_file, Path(folder) / name, options)
    print(f"PRIVATE, do not publish. Held-out authors; models trained on {number:,} texts each\n")
    print("| trained on | loss | perplexity |\n|---|---|---|")
    for name, found in (("nothing", metrics["real"]["before"]), *((name, metrics[name]["after"]) for name in texts)):
        print(f"| {name} | {found['eval_loss']:.3f} | {found['eval_perplexity']:,.1f} |")


if __name__ == "__main__":
    main()
