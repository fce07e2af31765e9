"""Try every causal language model class of the installed transformers, tiny: clipped exactly, or refused, and why.

    python benchmarks/models.py                      # writes docs/models.md
    python benchmarks/models.py gemma2 mamba2        # some model types, on the screen

Compares with a plain loop over authors that shares no code with the library, for authors with one and with two samples.
"""

import argparse
import warnings
from collections import Counter
from datetime import date
from typing import Any, NamedTuple

import torch
import transformers
from common import ROOT, format_row, main, option, table
from tiny import VOCABULARY, build, classes
from torch import nn
from transformers.utils import logging

from author_dp.clipping import ENGINES
from author_dp.errors import UserError
from author_dp.guards.model_check import check_model, verify_model
from author_dp.mechanism.losses import author_losses
from author_dp.models.lora import add_lora_adapters
from author_dp.models.modes import deterministic_train_mode

TOLERANCE = 2e-4
KINDS = (("full", "ghost"), ("full", "grad_sample"), ("lora", "ghost"))
HEAD = """# Which models?

Which models can you train, and how does this program know that it clips them correctly? Every causal language model that transformers
loads can be trained if it passes the model check at the start of the run.

The [model check](verification.md#the-model-check) uses your model itself, with random tokens. It compares logits, norms and clipped sums
with a reference loop over authors. A model that fails is refused with the reason. To check a model without a full run, add `--dry_run` to
your command. To check a model type in tiny form, name it: `python benchmarks/models.py gemma2 mamba2` prints its row of the table below.

## Kinds of models

- **Per-author fallback.** Some parameters have no clipping rule: the three-dimensional weights of stacked experts, the own parameters of
  some mixers (Mamba, RWKV), DoRA's magnitudes. They are clipped exactly, by the ordinary gradient of one author's loss.
  - Microbatches then have one author. Memory is that of one author's samples, and one more copy of these parameters' gradients.
  - The speed is that of small batches. A GPT-2 of width 256 took 1.3 to 1.4 times as long as with rules
    (`python benchmarks/costs.py fallback`, 2026-11-25, one CPU thread).
- **Mixtures of experts.** They train like other models if the router handles each token by itself, as it then mixes no authors. The
  balancing losses of pre-training are not part of the loss. Routing statistics are private and are not released.
  - In full fine-tuning, stacked experts use the per-author fallback.
  - With LoRA in all linear layers, peft also adapts the stacked experts of some types (Mixtral). These adapters use the fallback. In other
    types (GPT-OSS, Qwen2-MoE), stacked experts stay frozen. To leave experts out, name layers in `--lora_target_modules`.
  - Nothing guarantees [constant shapes](threat-model.md#rounding-and-shapes) for layers of experts.
- **Not causal.** BERT models without `is_decoder`, XLM and XLNet see later tokens, and are refused.
- **Encoder-decoder models** are refused. Classes that are only the decoder of one (BartForCausalLM) train. Their unused cross-attention is
  frozen.
- **Batch norm** mixes authors, and is refused.
- **Dropout** must be independent for each sample. LayerDrop above 0 is refused
  ([random numbers](threat-model.md#random-numbers-inside-the-model)).
- **Long texts.** Rope that depends on the longest sample of a batch (dynamic, longrope) is refused if `--sequence_len` reaches its switch.
- **Types.** Trained weights must be float32; `--bf16` computes in bfloat16. Under LoRA, the frozen base may be in bfloat16
  (`--base_dtype bfloat16`) or 4 bits (`--load_in_4bit`).
- **Memory.** [results.md](results.md#memory-by-model-size) has the memory of models by their number of parameters.

## Model types tried

`python benchmarks/models.py` wrote this table on {date}, on a CPU. It builds each class of transformers tiny, by one recipe: width 32,
two layers, vocabulary 120. Your own run checks the full width.

It compares norms and clipped sums, for authors with one and with two ragged samples, with a plain loop that shares no code with the library.
"Exact" means within 2e-4. Of the {classes} classes in transformers {version}, the recipe builds {rows}.

| training | clipping | result |
|---|---|---|
| full fine-tuning | `--clipping ghost` (the default) | {sums[0]} |
| full fine-tuning | `--clipping grad_sample` (Opacus) | {sums[1]} |
| LoRA in all linear layers | `--clipping ghost` | {sums[2]} |

In remarks, "2 of 34 by fallback" means that 2 of 34 trained parameters use the per-author fallback.

| model type | full, ghost | full, grad_sample | LoRA, ghost | remarks |
|---|---|---|---|---|
{table}

Not built by the recipe: {missing}.
"""  # noqa: E501


class Verdict(NamedTuple):
    kind: str  # exact, refused, wrong, or traceback
    error: float = 0.0
    remark: str = ""


def with_lora(model: Any) -> nn.Module:
    """LoRA in all linear layers but the head, its factors at random: the second one starts at zero."""
    model = add_lora_adapters(model, ["all-linear"], r=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(per_author: int, authors: int = 4, seed: int = 0) -> dict[str, Any]:
    """Return ragged samples of 2 to 9 tokens, `per_author` of each author."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (authors * per_author,), generator=generator)
    lengths[0] = 9
    ids = torch.randint(1, VOCABULARY, (len(lengths), 9), generator=generator)
    there = torch.arange(9) < lengths[:, None]
    author = torch.arange(authors).repeat_interleave(per_author)
    return {"input_ids": ids * there, "labels": ids.where(there, -100), "author": author, "num_authors": authors}


def plain(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Return each author's gradient, flat, by one backward a sample."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for author in range(batch["num_authors"]):
        rows = [row[row != -100] for row in batch["labels"][batch["author"] == author]]
        loss: Any = 0
        for row in rows:
            logits = model(input_ids=row[None]).logits[0, :-1]
            loss = loss + nn.functional.cross_entropy(logits, row[1:], reduction="sum") / sum(len(row) - 1 for row in rows)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)]))
    return gradients


def difference(model: nn.Module, clipping: str, per_author: int, seed: int = 0) -> float:
    """Return the largest relative difference of norms and clipped sum from the plain loop, some authors clipped."""
    batch = make_batch(per_author, seed=seed)
    gradients = plain(model, batch)
    expected = torch.stack([gradient.norm() for gradient in gradients])
    clip_norm = float(expected.median())
    engine = ENGINES[clipping](model, clip_norm)
    parameters: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    norms = engine.backward(author_losses(engine.module, batch), batch["author"])
    engine.close()
    ours = torch.cat([parameter.summed_grad.flatten() for parameter in parameters])
    clipped = sum(gradient * min(1.0, clip_norm / float(norm)) for gradient, norm in zip(gradients, expected))
    return max(float(((norms - expected) / expected).abs().max()), float((ours - clipped).norm() / clipped.norm()))


def try_out(model_type: str, kind: str, clipping: str = "ghost", **options: Any) -> Verdict:
    """Run the model check, then compare with the plain loop, as a run would use this model."""
    model: Any = build(model_type, **options)
    try:
        check_model(model, call_model=False)
        model = with_lora(model) if kind == "lora" else model
        check = verify_model(model, clipping, sequence_len=24)
        with deterministic_train_mode(model):
            error = max(difference(model, clipping, per_author) for per_author in (1, 2))
            # Two experts nearly tied may change places beside padding; a wrong clip is wrong for all texts.
            if error >= TOLERANCE:
                error = max(difference(model, clipping, per_author, seed=1) for per_author in (1, 2))
    except UserError as refusal:
        return Verdict("refused", remark=str(refusal))
    except Exception as failure:
        return Verdict("traceback", remark=f"{type(failure).__name__}: {first_line(failure)}")
    trained, fallback = sum(p.requires_grad for p in model.parameters()), len(check.fallback_params)
    remarks = [f"{kind}: {fallback} of {trained} by fallback"] if fallback else []
    remarks += [f"{kind}: {len(check.unused)} unused, frozen"] if check.unused else []
    return Verdict("exact" if error < TOLERANCE else "wrong", error, ", ".join(remarks))


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def row_of(model_type: str) -> list[str] | None:
    """Return a row of the table, None where the recipe builds no such model."""
    try:
        build(model_type)
    except Exception as failure:
        print(f"{model_type}: not built: {first_line(failure)}", flush=True)
        return None
    verdicts = [try_out(model_type, *kind) for kind in KINDS]
    remarks = list(dict.fromkeys(verdict.remark for verdict in (verdicts[0], verdicts[-1]) if verdict.remark))
    if "is_decoder" in verdicts[0].remark:
        as_decoder = try_out(model_type, "full", is_decoder=True)
        remarks = [f"sees later tokens; with is_decoder in its config: {as_decoder.kind}"]
    row = [model_type, *(verdict.kind for verdict in verdicts), "; ".join(remarks).split(" (")[0]]
    print(*row, f"{max(verdict.error for verdict in verdicts):.0e}", sep=" | ", flush=True)
    return row


def page(rows: list[list[str]], missing: list[str], day: str) -> str:
    """Return what docs/models.md is to hold."""
    counts = [Counter(row[column] for row in rows) for column in (1, 2, 3)]
    sums = ["; ".join(f"{kind} {count}" for kind, count in sorted(each.items())) for each in counts]
    return HEAD.format(
        classes=len(rows) + len(missing), rows=len(rows), version=transformers.__version__, sums=sums,
        table="\n".join(format_row(*row) for row in rows), missing=", ".join(missing), date=day,
    )  # fmt: skip


@table(option("model_types", nargs="*", help="print their rows alone"))
def models(args: argparse.Namespace) -> None:
    """Write docs/models.md, or print the rows of some model types."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    names = args.model_types or sorted(classes())
    found = {name: row_of(name) for name in names}
    text = page([row for row in found.values() if row], [name for name, row in found.items() if row is None], str(date.today()))
    if not args.model_types:
        (ROOT / "docs" / "models.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(__doc__, models)
