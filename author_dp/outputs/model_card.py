"""The model card of a result, with Hugging Face's metadata: how to load it, its guarantee, its settings; public values only."""

from pathlib import Path
from typing import Any, Optional

from huggingface_hub import ModelCardData
from transformers import TrainingArguments

from author_dp.outputs.page import fmt, guarantee_rows, has_guarantee, plain_summary

OPTIONS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "bf16")
MODULE_PREFIXES = {
    "peft": "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer",
    "transformers": "from transformers import AutoModelForCausalLM, AutoTokenizer",
}
COUNTED = " and the number of steps"
CARD = """---
{metadata}
---

# {title}

{words}

## How to load it

```python
{imports}

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = {model_class}.from_pretrained(name)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True, max_new_tokens=40)[0]))
```

`name` is the folder of this card, or its name on the hub.{base}

## Guarantee

| | |
|---|---|
{guarantee}

`privacy.json` holds these numbers, and the SHA-256 of the weights that they are about.

Not covered: authors who were held out for evaluation; people who appear in the texts of others; choices among several runs, and
further models trained on the same authors; the base model's own training data. {counts} are taken as public.

## Settings

| | |
|---|---|
{settings}
"""


def public_settings(args: TrainingArguments, model: Any, model_name: Optional[str]) -> dict[str, Any]:
    """Return options of a run for privacy.json, where no other key of it names them.

    Args:
        model_name: hub name or local folder; the path of a folder stays here.
    """
    settings = {name: getattr(args, name) for name in OPTIONS}
    settings = {name: getattr(value, "value", value) for name, value in settings.items()}
    is_local = not model_name or Path(model_name).exists() or Path(model_name).is_absolute()
    settings["model_name"] = None if is_local else model_name
    if config := getattr(model, "peft_config", {}).get("default"):
        targets = config.target_modules
        settings["lora"] = {
            "lora_dim": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_target_modules": targets if isinstance(targets, str) else sorted(targets or []),
        }
    return settings


def model_card(report: dict[str, Any], name: str = ".") -> str:
    """Return the model card.

    Args:
        report: what privacy.json holds.
        name: by which the model is loaded.
    """
    covered, is_adapter = has_guarantee(report), bool(report.get("adapter_base"))
    settings, data = dict(report.get("settings") or {}), report.get("data") or {}
    library = "peft" if is_adapter else "transformers"
    base_name, dataset = settings.pop("model_name", None), data.get("dataset")
    metadata = ModelCardData(
        base_model=base_name,
        datasets=[dataset] if dataset else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["text-generation", *(["differential-privacy", "author-level-dp"] if covered else [])],
    )
    base = ""
    if is_adapter and not base_name:
        base = (
            " `adapter_config.json` names the base model by the path that it had when this adapter was trained; put yours there."
        )
    options = {"base_model": base_name, "dataset": dataset, **data, **settings.pop("lora", {}), **settings}
    return CARD.format(
        metadata=metadata.to_yaml(),
        title="Fine-tuned with author-level differential privacy" if covered else "Fine-tuned without a privacy guarantee",
        words=plain_summary(report),
        imports=MODULE_PREFIXES[library],
        model_class="AutoPeftModelForCausalLM" if is_adapter else "AutoModelForCausalLM",
        name=name,
        base=base,
        counts=("The sample rate" if report["num_authors"] is None else "The number of authors, the sample rate") + COUNTED,
        guarantee=table(dict(guarantee_rows(report))),
        settings=table({option: escape_cell(value) for option, value in options.items() if value is not None}),
    )


def escape_cell(value: Any) -> str:
    return fmt(value) if isinstance(value, float) else str(value)


def table(rows: dict[str, str]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
