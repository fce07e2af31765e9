"""Every causal language model class of the installed transformers, tiny: which are clipped exactly, which are refused, and why.

    python benchmarks/models.py                      # writes docs/models.md
    python benchmarks/models.py gemma2 mamba2        # some model types, on the screen

Judged by a plain loop over authors that shares no code with the library, on authors of one and of two samples.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tiny import VOCABULARY, build, classes  # noqa: E402

from author_dp.adapters import add_lora  # noqa: E402
from author_dp.clipping import ENGINES  # noqa: E402
from author_dp.errors import UserError  # noqa: E402
from author_dp.guards import check_model  # noqa: E402
from author_dp.mechanism import author_losses  # noqa: E402
from author_dp.proof import prove  # noqa: E402

TOLERANCE = 2e-4
KINDS = ("full", "lora")


class Verdict(NamedTuple):
    kind: str  # exact, refused, wrong, or traceback
    error: float = 0.0
    remark: str = ""


def with_lora(model: Any) -> nn.Module:
    """LoRA in all linear layers but the head, its factors at random: the second one starts at zero."""
    model = add_lora(model, ["all-linear"], r=2)
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


def difference(model: nn.Module, clipping: str, per_author: int) -> float:
    """Return the largest relative difference of norms and clipped sum from the plain loop, some authors clipped."""
    batch = make_batch(per_author)
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


def try_out(model_type: str, kind: str, clipping: str = "ghost") -> Verdict:
    """Prove, then compare: what a run would do with this model."""
    model = build(model_type)
    try:
        check_model(model)
        model = with_lora(model) if kind == "lora" else model
        proof = prove(model, clipping, sequence_len=24)
        model.eval() if clipping == "ghost" else model.train()
        error = max(difference(model, clipping, per_author) for per_author in (1, 2))
    except UserError as refusal:
        return Verdict("refused", remark=str(refusal))
    except Exception as failure:
        return Verdict("traceback", remark=f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:150]}")
    remarks = [f"{len(proof.apart)} of {sum(p.requires_grad for p in model.parameters())} apart"] if proof.apart else []
    remarks += [f"{len(proof.unused)} unused frozen"] if proof.unused else []
    return Verdict("exact" if error < TOLERANCE else "wrong", error, ", ".join(remarks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_types", nargs="*")
    parser.add_argument("--clipping", default="ghost", choices=list(ENGINES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    counts: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for model_type in arguments.model_types or classes():
        try:
            build(model_type)
        except Exception as failure:
            print(f"{model_type}: not built: {str(failure).strip().splitlines()[0][:100]}", flush=True)
            continue
        for kind in KINDS:
            start = time.time()
            verdict = try_out(model_type, kind, arguments.clipping)
            counts[kind][verdict.kind] = counts[kind].get(verdict.kind, 0) + 1
            print(
                f"{model_type} {kind}: {verdict.kind} {verdict.error:.1e} {verdict.remark} ({time.time() - start:.1f} s)",
                flush=True,
            )
    print(counts, transformers.__version__)


if __name__ == "__main__":
    main()
